import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ling_flow.data.build import build_corpus
from ling_flow.data.chat import chat_template_digest
from ling_flow.data.corpus import Corpus, token_dtype
from ling_flow.data.documents import documents, pin
from ling_flow.data.sources import FilesSource, Source
from ling_flow.errors import UserError

from .conftest import SOURCES, build


def texts_of(corpus: Corpus, source: str, split: str) -> list[str]:
    """Documents read back from a shard, cut at its index."""
    tokens, offsets = corpus.tokens(source, split), corpus.document_offsets(source, split)
    assert offsets[0] == 0 and offsets[-1] == len(tokens)
    assert all(tokens[offsets[1:] - 1] == corpus.tokenizer.eos_id)
    return [corpus.tokenizer.decode(tokens[a : b - 1]) for a, b in pairwise(offsets)]


def lines_source(path: Path, texts: list[str], name: str = "mine") -> FilesSource:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return FilesSource(name=name, paths=[str(path)])


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_document_is_there_once_in_the_split_of_its_hash(corpus: Corpus, source: Source) -> None:
    expected = dict.fromkeys(documents(source, seed=0))
    shares = {text: int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 for text in expected}
    train, validation = (texts_of(corpus, source.name, split) for split in ("train", "validation"))
    assert set(train) == {text for text in expected if shares[text] >= 0.1}
    assert set(validation) == {text for text in expected if shares[text] < 0.1}
    assert len(train) + len(validation) == len(expected)
    statistics = corpus.statistics.sources[source.name]
    assert statistics.documents == len(expected)
    assert statistics.duplicates == len(list(documents(source, seed=0))) - len(expected)


def test_duplicates_across_sources_are_left_out(tmp_path: Path) -> None:
    texts = [f"text number {number}" for number in range(40)]
    first = lines_source(tmp_path / "a.jsonl", [*texts[:30], *texts[:5]], "first")
    second = lines_source(tmp_path / "b.jsonl", texts[20:], "second")
    corpus = build(tmp_path / "corpus", [first, second], validation_share=0.3)
    assert [corpus.statistics.sources[name].duplicates for name in ("first", "second")] == [5, 10]
    read = [
        text for name in corpus.sources for split in ("train", "validation") for text in texts_of(corpus, name, split)
    ]
    assert sorted(read) == sorted(texts)
    assert corpus.statistics.duplicates == 15 and corpus.statistics.documents == 40


def test_control_tokens_come_from_the_chat_format_only(corpus: Corpus, tmp_path: Path) -> None:
    role = corpus.tokenizer.token_id("<role>")
    assert (corpus.tokens("chat") == role).sum() == 3 * corpus.statistics.sources["chat"].train.documents
    mine = build(tmp_path / "corpus", [lines_source(tmp_path / "a.jsonl", ["<role>a<|endoftext|>", "b", "c", "d"])])
    specials = {mine.tokenizer.token_id(token) for token in ("<role>", "</role>")}
    tokens = np.concatenate([mine.tokens("mine", split) for split in ("train", "validation")])
    assert not specials & set(tokens.tolist())
    assert (tokens == mine.tokenizer.eos_id).sum() == 4


def test_unigram_entropy_is_the_cross_entropy_of_validation(corpus: Corpus) -> None:
    vocab_size = corpus.statistics.vocab_size

    def measure(names: list[str]) -> float:
        counts = Counter(token for name in names for token in corpus.tokens(name).tolist())
        total = sum(counts.values())
        found = [token for name in names for token in corpus.tokens(name, "validation").tolist()]
        return -sum(math.log((counts[token] + 1) / (total + vocab_size)) for token in found) / len(found)

    assert corpus.statistics.unigram_entropy == pytest.approx(measure(corpus.sources))
    for name in corpus.sources:
        assert corpus.statistics.sources[name].unigram_entropy == pytest.approx(measure([name]))


def test_same_arguments_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    again = build(tmp_path / "again")
    assert again.statistics == corpus.statistics
    for file in sorted(corpus.path.rglob("*")):
        if file.is_file():
            assert (again.path / file.relative_to(corpus.path)).read_bytes() == file.read_bytes()
    assert build(tmp_path / "other", seed=1).statistics.digest != corpus.statistics.digest


def test_statistics_say_what_is_on_disk(corpus: Corpus) -> None:
    statistics = corpus.statistics
    assert statistics.tokenizer_digest == corpus.tokenizer.digest
    assert statistics.chat_template_digest == chat_template_digest()
    assert statistics.vocab_size == corpus.tokenizer.vocab_size == 400
    assert statistics.tokens == sum(
        len(corpus.tokens(name, split)) for name in corpus.sources for split in ("train", "validation")
    )
    for name in corpus.sources:
        assert corpus.tokens(name).dtype == np.uint16
        shard = corpus.path / "shards" / name / "train-00000.bin"
        assert hashlib.sha256(shard.read_bytes()).hexdigest() == statistics.sources[name].train.digest


def test_large_vocabularies_take_four_bytes() -> None:
    assert token_dtype(65535).itemsize == 2
    assert token_dtype(65536).itemsize == 4


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def scramble(path: Path) -> None:
    path.write_bytes(b"?" * path.stat().st_size)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("shards/sums/train-00000.bin", truncate),
        ("shards/sums/train-00000.bin", Path.unlink),
        ("shards/chat/validation-00000.bin", truncate),
        ("shards/code/train-00000.idx.npy", truncate),
        ("shards/code/train-00000.idx.npy", scramble),
        ("shards/code/validation-00000.idx.npy", Path.unlink),
        ("tokenizer/tokenizer.json", Path.unlink),
        ("tokenizer/tokenizer.json", truncate),
        ("corpus.json", Path.unlink),
        ("corpus.json", truncate),
        ("corpus.json", scramble),
    ],
)
def test_damage_is_named(corpus: Corpus, tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus.path, copy)
    damage(copy / file)
    with pytest.raises(UserError) as caught:
        Corpus.open(copy)
    assert str(copy / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus.path, copy)
    other = build(tmp_path / "other", [lines_source(tmp_path / "a.jsonl", ["other text", "more text", "again"])])
    other.tokenizer.save(copy / "tokenizer")
    with pytest.raises(UserError, match="not the tokenizer of this corpus"):
        Corpus.open(copy)


def test_unknown_source_names_the_known_ones(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="has no source 'wiki'; it has code, sums, chat"):
        corpus.tokens("wiki")


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    good = lines_source(tmp_path / "a.jsonl", ["a", "b", "c"], "good")
    bad = lines_source(tmp_path / "b.jsonl", ["x" * 40_000, "d"], "bad")
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write('\n{"text": ')  # beyond what the tokenizer's sample reads: fails while shards are written
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"b\.jsonl:3: not valid JSON"):
        build(tmp_path / "corpus", [good, bad])
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_change_while_they_are_read_give_no_corpus(tmp_path: Path) -> None:
    source = pin(lines_source(tmp_path / "a.jsonl", ["a", "b", "c"]))
    assert build(tmp_path / "corpus", [source]).statistics.documents == 3
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('\n{"text": "d"}')  # a download that goes on
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"a\.jsonl: has changed while it was read; run again when nothing writes it"):
        build(tmp_path / "again", [source])
    assert sorted(tmp_path.iterdir()) == before


def test_output_must_be_empty(tmp_path: Path) -> None:
    source = lines_source(tmp_path / "a.jsonl", ["a", "b", "c"])
    (tmp_path / "corpus").mkdir()
    build(tmp_path / "corpus", [source])
    with pytest.raises(UserError, match="must be an empty or new directory"):
        build(tmp_path / "corpus", [source])


@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_few_documents_still_give_one_for_validation(tmp_path: Path, count: int) -> None:
    texts = [f"short text {number}" for number in range(count)]
    corpus = build(tmp_path / "corpus", [lines_source(tmp_path / "a.jsonl", texts)], validation_share=1e-6)
    lowest = min(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert texts_of(corpus, "mine", "validation") == [lowest]
    assert sorted([*texts_of(corpus, "mine", "train"), lowest]) == sorted(texts)


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sources\.mine: gives 0 training and 1 validation documents"):
        build(tmp_path / "corpus", [lines_source(tmp_path / "a.jsonl", ["only", "only"])])


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    build_corpus(
        tmp_path / "corpus",
        [lines_source(tmp_path / "a.jsonl", ["a", "b", "c"])],
        vocab_size=300,
        validation_share=0.1,
        tokenizer_characters=100,
        seed=0,
        progress=lambda *call: calls.append(call),
    )
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][:2] == (2, 2)
    lines = [text for _, _, text in calls if text.startswith("mine: ")]
    assert re.fullmatch(r"mine: 2 documents, 4 tokens, [0-9,]+ tokens/s, 0:00:00 left", lines[-1])
