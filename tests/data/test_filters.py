import json
import random
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ling_flow.data import near_duplicates, quality
from ling_flow.data.build import build_corpus
from ling_flow.data.contamination import EvaluationNgrams, evaluation_ngrams
from ling_flow.data.corpus import Corpus
from ling_flow.data.documents import pin
from ling_flow.data.filters import Decontamination, Filters, NearDuplicates, QualityFilter
from ling_flow.data.near_duplicates import ALIKE, NearIndex, rows_per_band, signatures
from ling_flow.data.reasoning import TaskSpec, problems
from ling_flow.data.report import html_page
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


def similarity(one: str, other: str) -> float:
    found = signatures([one, other], NearDuplicates())
    return float((found[0] == found[1]).mean())


def test_signatures_of_any_script_and_form() -> None:
    chinese = "".join(f"第{number}章讲述了小明在城市里遇到的第{number}个朋友以及他们之间的故事" for number in range(30))
    assert similarity(chinese, chinese.replace("第15个朋友", "第15位朋友")) > 0.95
    assert similarity(chinese, "".join(reversed(chinese))) < 0.3
    french = " ".join(f"l'élève numéro {number} était déjà là" for number in range(40))
    assert similarity(french, unicodedata.normalize("NFD", french.upper())) == 1


def test_texts_of_one_template_are_compared_with_a_bounded_number() -> None:
    settings, rng = NearDuplicates(threshold=0.8), np.random.default_rng(0)
    template = rng.integers(0, 2**32, 128, dtype=np.uint32)
    texts = rng.integers(0, 2**32, (400, 128), dtype=np.uint32)
    texts[:, :64] = template[:64]  # half of all bands in common, and far from the threshold
    index = NearIndex(settings)
    assert all(map(index.add, texts)) and index.documents == 400
    assert max(len(numbers) for band in index.bands for numbers in band.values()) == ALIKE
    assert index.partly == 400 - ALIKE
    assert not any(map(index.add, texts))  # each is found by the bands of its own
    assert index.partly == 400 - ALIKE


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


CHINESE = "小明有三十七个苹果，又买了五个，送给小红八个，请问小明现在还剩下多少个苹果？"


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (CHINESE, f"下面这道题很有意思{CHINESE[:-1]}。答案是三十四。"),
        ("请计算三十七加五等于多少？", "题目：请计算三十七加五等于多少? 四十二"),
        (
            "太郎さんはりんごを三十七個持っています。全部で何個ですか。",
            "問題です太郎さんはりんごを三十七個持っています",
        ),
        ("สมชายมีแอปเปิ้ลสามสิบเจ็ดลูก", "ข้อนี้สมชายมีแอปเปิ้ลสามสิบเจ็ดลูก"),
        (LONG, LONG.replace("farmer", "**farmer**").replace("sheep", "she\u00adep").replace("night", "*night*")),
        (f"{LONG} Zoë's café?", unicodedata.normalize("NFD", "in the night; how many are left? Zoë\u2019s café")),
        ("ａｂ 12 + 13 =？", "ab 12 + 13 = 25"),
        ("Compute the sum now.", "Compute the sum now, please"),
    ],
)
def test_problems_are_found_in_any_script_and_form(problem: str, text: str) -> None:
    assert EvaluationNgrams([problem], ngram=13).shared(text) is not None
    assert EvaluationNgrams([text], ngram=13).shared(problem) is not None or len(text) > len(problem)
    assert (
        EvaluationNgrams([problem], ngram=13).shared("今天天气很好。 An ordinary text of a dozen words, or so.") is None
    )


def test_problems_too_short_are_counted_and_told(tmp_path: Path) -> None:
    mine = texts_source(tmp_path / "a.jsonl", [f"text number {number}" for number in range(20)])
    own = texts_source(tmp_path / "own.jsonl", ["Why not?", "求面积。", "What is a number?"], "own")
    corpus = build(tmp_path / "corpus", [mine], decontamination=Decontamination(files=(own,)))
    found = corpus.statistics.filters
    assert found and (found.problems, found.short_problems, found.partly_compared) == (1, 2, None)
    assert "1 evaluation problems; 2 more are too short to be looked for." in html_page(corpus.statistics, "x")
    assert json.loads((corpus.path / "corpus.json").read_text())["filters"] == {"problems": 1, "short_problems": 2}
    plain = build(tmp_path / "plain", [mine])
    assert plain.statistics.filters is None and "filters" not in json.loads((plain.path / "corpus.json").read_text())


def test_templates_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "ALIKE", 2)
    rng = random.Random(5)
    template = " ".join(words(rng, 100))
    mine = texts_source(tmp_path / "a.jsonl", [f"{template} {' '.join(words(rng, 20))}" for _ in range(40)])
    corpus = build(tmp_path / "corpus", [mine], near_duplicates=NearDuplicates())
    found = corpus.statistics.filters
    assert found and found.problems is None and found.partly_compared and corpus.statistics.documents == 40
    assert f"<p>{found.partly_compared} documents share so much" in html_page(corpus.statistics, "x")


def test_every_line_of_a_text_is_a_problem(tmp_path: Path) -> None:
    questions = ["What is the capital city of Burkina Faso?", "Who wrote the opera about the barber of Seville?"]
    (tmp_path / "q.txt").write_bytes("\ufeff".encode() + "\r\n\r\n".join(questions).encode())
    settings = Decontamination(files=(FilesSource(name="own", paths=[str(tmp_path / "q.txt")]),))
    evaluation = evaluation_ngrams(settings)
    assert evaluation.problems == 2
    assert all(evaluation.shared(f"Quiz: {question} Answer below.") for question in questions)


def test_an_evaluation_set_that_has_changed_since_its_digest_was_taken_is_refused(tmp_path: Path) -> None:
    own = pin(texts_source(tmp_path / "own.jsonl", ["What is a number?"], "own"))
    texts_source(tmp_path / "own.jsonl", ["What is a letter of the alphabet?"], "own")
    with pytest.raises(UserError, match=r"own\.jsonl: has changed while it was read"):
        evaluation_ngrams(Decontamination(files=(own,)))  # type: ignore[arg-type]


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
