import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ling_flow.data import quality
from ling_flow.data.build import build_corpus
from ling_flow.data.contamination import EvaluationNgrams, evaluation_ngrams
from ling_flow.data.corpus import Corpus
from ling_flow.data.filters import Decontamination, Filters, NearDuplicates, QualityFilter
from ling_flow.data.near_duplicates import NearIndex, rows_per_band, signatures
from ling_flow.data.reasoning import TaskSpec, problems
from ling_flow.data.sources import FilesSource, ReasoningSource, Source
from ling_flow.errors import UserError

SUMS = TaskSpec(name="chain_sum", difficulties=(1, 2))


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10_000)}" for _ in range(count)]


def changed(rng: random.Random, text: list[str], at: list[int]) -> list[str]:
    return [f"changed{rng.randrange(10_000)}" if place in at else word for place, word in enumerate(text)]


def texts_source(path: Path, texts: list[str], name: str = "mine") -> FilesSource:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return FilesSource(name=name, paths=[str(path)])


def build(path: Path, sources: list[Source], **filters: Any) -> Corpus:
    return build_corpus(
        path, sources, vocab_size=300, validation_share=0.2, tokenizer_characters=5000, seed=0,
        filters=Filters(**filters),
    )  # fmt: skip


def texts_of(corpus: Corpus, source: str) -> set[str]:
    found = set()
    for split in ("train", "validation"):
        tokens, offsets = corpus.tokens(source, split), corpus.document_offsets(source, split)
        found |= {corpus.tokenizer.decode(tokens[a : b - 1]) for a, b in pairwise(offsets)}
    return found


# Near duplicates


def test_signatures_estimate_the_share_of_common_ngrams() -> None:
    rng, settings = random.Random(0), NearDuplicates(ngram=3, permutations=256)
    errors = []
    for _ in range(40):
        one = words(rng, 200)
        other = changed(rng, one, rng.sample(range(200), rng.randrange(60)))
        shingles = [{tuple(text[at : at + 3]) for at in range(198)} for text in (one, other)]
        true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        found = signatures([" ".join(one), " ".join(other)], settings)
        errors.append((found[0] == found[1]).mean() - true)
    assert abs(np.mean(errors)) < 0.015  # no bias: 40 estimates of standard error 0.03 each
    assert max(map(abs, errors)) < 0.12


def test_signatures_see_neither_case_nor_signs_nor_spaces() -> None:
    one, same, other = signatures(
        ["The cat, sat on a mat and slept", "the CAT sat\non a mat -- and slept.", "the cat sat on a mat and died"],
        NearDuplicates(),
    )
    assert (one == same).all() and not (one == other).all()
    signs = signatures(["!?", "!!"], NearDuplicates())
    assert not (signs[0] == signs[1]).any()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("permutations", [16, 128, 256])
def test_pairs_at_the_threshold_become_candidates(threshold: float, permutations: int) -> None:
    rows = rows_per_band(threshold, permutations)
    assert permutations % rows == 0
    found = 1 - (1 - threshold**rows) ** (permutations // rows)
    assert found >= 0.9 or rows == 1


def test_the_index_finds_what_comparing_all_pairs_finds() -> None:
    rng, settings = random.Random(1), NearDuplicates(threshold=0.7, ngram=2)
    originals = [words(rng, 80) for _ in range(60)]
    copies = [changed(rng, rng.choice(originals), rng.sample(range(80), rng.randrange(16))) for _ in range(200)]
    found = signatures([" ".join(text) for text in [*originals, *copies]], settings)
    index, kept, missed = NearIndex(settings), [], 0
    for signature in found:
        is_near = any((signature == other).mean() >= 0.7 for other in kept)
        is_new = index.add(signature)
        assert is_near or is_new  # never leaves out what is near nothing
        missed += is_near and is_new
        if is_new:
            kept.append(signature)
    assert 60 < len(kept) < 200 and missed <= 3


def test_near_duplicates_are_left_out_and_counted_by_source(tmp_path: Path) -> None:
    rng = random.Random(2)
    texts = [words(rng, 120) for _ in range(30)]
    near = [changed(rng, text, [5]) for text in texts[:10]]  # 5 of 116 n-grams differ
    far = [changed(rng, text, list(range(0, 120, 3))) for text in texts[10:20]]
    first = texts_source(tmp_path / "a.jsonl", [" ".join(text) for text in [*texts, *near[:4]]], "first")
    second = texts_source(tmp_path / "b.jsonl", [" ".join(text) for text in [*near[4:], *far]], "second")
    corpus = build(tmp_path / "corpus", [first, second], near_duplicates=NearDuplicates())
    statistics = corpus.statistics
    assert [statistics.sources[name].near_duplicates for name in ("first", "second")] == [4, 6]
    assert (statistics.near_duplicates, statistics.duplicates, statistics.documents) == (10, 0, 40)
    assert texts_of(corpus, "second") == {" ".join(text) for text in far}
    everything = build(tmp_path / "everything", [first, second])
    assert everything.statistics.documents == 50 and everything.statistics.near_duplicates == 0


# Decontamination


LONG = "A farmer has 17 sheep and all but 9 of them run away in the night; how many are left?"


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("x 47 + 38 = 85", "47 + 38 ="),
        ("47+38=85", "47 + 38 ="),
        ("5 + 47 + 38 = 90", "47 + 38 ="),
        ("147 + 38 = 185", None),
        ("47 - 38 = 9", None),
        ("47 + 38", None),
        ("GCD 48, 36 = 12", "gcd 48 , 36 ="),
        (f"Once upon a time. {LONG.upper()} Nine.", "a farmer has 17 sheep and all but 9 of them run away"),
        (LONG.replace("farmer", "shepherd"), "has 17 sheep and all but 9 of them run away in the"),
        (LONG.replace("sheep", "goats"), "and all but 9 of them run away in the night ; how"),
        (LONG.replace("them", "those"), None),  # no 13 words in a row are left
        ("two words", None),
        ("", None),
    ],
)
def test_shared_ngrams(text: str, shared: str | None) -> None:
    evaluation = EvaluationNgrams(["47 + 38 = ?", "gcd 48, 36 = ?", LONG, "Two words?"], ngram=13)
    assert evaluation.shared(text) == shared


def test_every_held_out_problem_is_found_in_a_training_text_that_states_it() -> None:
    settings = Decontamination(tasks=(SUMS, TaskSpec(name="number_sorting", difficulties=(1, 5))), problems=300, seed=4)
    evaluation = evaluation_ngrams(settings)
    asked = problems(settings.tasks, 300, 4, "held_out")
    assert all(evaluation.shared(f"first\n{problem.question.removesuffix('?')}{problem.answer}\n") for problem in asked)
    others = problems(settings.tasks, 300, 4, "train")
    assert sum(evaluation.shared(problem.question) is None for problem in others) > 290


def test_contaminated_documents_are_left_out_counted_and_shown(tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = [" ".join(words(rng, 30)) for _ in range(20)]
    held_out = problems([SUMS], 5, 1, "held_out")
    bad = [f"{text} {problem.question}" for text, problem in zip(texts, held_out, strict=False)]
    own = f"What do {texts[7]} and other words mean?"
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"question": own}))
    files = (FilesSource(name="own", paths=[str(evaluation)], text_field="question"),)
    procedural = ReasoningSource(name="sums", tasks=[SUMS], style="plain", documents=30)
    mine = texts_source(tmp_path / "a.jsonl", [*bad, *texts])
    settings = Decontamination(tasks=(SUMS,), problems=5, files=files)
    corpus = build(tmp_path / "corpus", [mine, procedural], decontamination=settings)
    assert texts_of(corpus, "mine") == {text for text in texts if text != texts[7]}
    statistics = corpus.statistics.sources
    assert statistics["mine"].contaminated == corpus.statistics.contaminated == 6
    shown = statistics["mine"].contaminated_samples
    assert [sample.text for sample in shown] == bad[:3]
    assert shown[0].ngram == held_out[0].question.removesuffix(" ?")
    assert statistics["sums"].contaminated == 0 and statistics["sums"].documents > 25


def test_an_evaluation_set_with_nothing_to_look_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "Why?"}')
    settings = Decontamination(files=(FilesSource(name="short", paths=[str(tmp_path / "short.jsonl")]),))
    with pytest.raises(UserError, match=r"filters\.decontamination\.files: short has no text of 3 words or more"):
        evaluation_ngrams(settings)


# Quality


def test_counters() -> None:
    counts = quality.count("Ein Haus\n\n  \nEin Haus\nÄ12 語!\nx")
    assert counts == quality.Counts(characters=30, alphabetic=17, lines=4, line_characters=23, repeated_lines=1)
    assert counts.mean_line_length == 23 / 4
    assert counts.alphabetic_share == 17 / 30
    assert counts.repeated_line_share == 1 / 4
    ascii_text = "a Z [ ` { 0 @ z A"
    assert quality.count(ascii_text).alphabetic == sum(map(str.isalpha, ascii_text)) == 4


def test_counters_add_up_over_a_source(tmp_path: Path) -> None:
    texts = ["eins zwei\neins zwei\n", "12345\n!\n!", "drei", "Größe\nund 語"]
    corpus = build(tmp_path / "corpus", [texts_source(tmp_path / "a.jsonl", texts)])
    statistics = corpus.statistics.sources["mine"]
    lines = [line for text in texts for line in text.split("\n") if line]
    assert statistics.characters == sum(map(len, texts))
    assert statistics.mean_line_length == sum(map(len, lines)) / len(lines)
    assert statistics.alphabetic_share == sum(map(str.isalpha, "".join(texts))) / len("".join(texts))
    assert statistics.repeated_line_share == 2 / len(lines)
    assert statistics.low_quality == 0


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, {"short", "123456789 x", "twice\ntwice", "a good line of ordinary words"}),
        ({"min_mean_line_length": 6}, {"123456789 x", "a good line of ordinary words"}),
        ({"max_mean_line_length": 12}, {"short", "123456789 x", "twice\ntwice"}),
        ({"min_alphabetic_share": 0.5}, {"short", "twice\ntwice", "a good line of ordinary words"}),
        ({"max_repeated_line_share": 0.4}, {"short", "123456789 x", "a good line of ordinary words"}),
    ],
)
def test_bounds_of_quality(tmp_path: Path, bounds: dict[str, float], expected: set[str]) -> None:
    texts = ["short", "123456789 x", "twice\ntwice", "a good line of ordinary words"]
    source = texts_source(tmp_path / "a.jsonl", texts)
    corpus = build(tmp_path / "corpus", [source], quality=QualityFilter(**bounds))
    assert texts_of(corpus, "mine") == expected
    assert corpus.statistics.low_quality == 4 - len(expected)


@pytest.mark.parametrize(
    "data",
    [
        {"near_duplicates": {"threshold": 0}},
        {"near_duplicates": {"permutations": 100}},
        {"decontamination": {}},
        {"decontamination": {"ngram": 2, "tasks": [{"name": "gcd"}]}},
        {"quality": {"min_alphabetic_share": 2}},
        {"near_duplicate": None},
    ],
)
def test_bad_declarations_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Filters.model_validate(data)
