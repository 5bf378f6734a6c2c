import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

from components.plan import PlanConfig, resolve_lifecycle
from components.prepare_data import PrepareDataConfig, _given_tokenizer, _pinned, prepare_data
from components.pretrain import stage_model
from ling_flow.config import parse
from ling_flow.data.chat import chat_template_digest
from ling_flow.data.corpus import Corpus
from ling_flow.data.reasoning import TaskSpec
from ling_flow.data.sources import FilesSource, ReasoningSource, StdlibSource
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError
from ling_flow.flow.tracking import NullTracker
from tests.conftest import Called
from tests.data import published

SUMS = [TaskSpec(name="chain_sum", difficulties=(1, 2))]


def small(path: Path, **fields: Any) -> PrepareDataConfig:
    sources = [
        FilesSource(name="mine", paths=[str(path)]),
        StdlibSource(name="python_prose", part="prose", max_characters=20_000),
        ReasoningSource(name="chat", tasks=SUMS, style="chat", documents=50),
    ]
    return PrepareDataConfig(sources=sources, vocab_size=350, validation_share=0.1, **fields)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_corpus_result_and_contract(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two", "three", "three"])
    outcome = prepare_data(small(path), root=tmp_path / "root")
    corpus = Corpus.open(outcome.outputs["corpus"])
    assert corpus.sources == ["mine", "python_prose", "chat"]
    result = outcome.result
    assert result.tokens == corpus.statistics.tokens > 5_000
    assert result.documents == corpus.statistics.documents
    assert result.duplicates >= 1
    assert result.vocab_size == 350
    assert 2 < result.unigram_entropy < 6
    manifest = json.loads((outcome.outputs["corpus"].parent / "manifest.json").read_text())
    contract = {
        "tokenizer": corpus.tokenizer.digest,
        "chat_template": chat_template_digest(),
        "vocab_size": 350,
    }
    assert manifest["outputs"]["corpus"]["contract"] == contract


def test_the_report_shows_the_corpus_and_goes_to_the_tracker(tmp_path: Path) -> None:
    class Kept(NullTracker):
        pages: ClassVar[list[str]] = []

        def artifact(self, path: Path) -> None:
            self.pages.append(path.read_text())

    path = write(tmp_path / "a.jsonl", ["one", "two", "three <b>"])
    outcome = prepare_data(small(path), root=tmp_path / "root", tracker=Kept())
    page = (outcome.outputs["report"] / "index.html").read_text()
    assert Kept.pages == [page]
    assert f"{outcome.result.tokens:,}" in page and "three &lt;b&gt;" in page


def test_filters_bear_identity_with_the_content_of_their_files_and_workers_do_not(tmp_path: Path) -> None:
    root, path = tmp_path / "root", write(tmp_path / "a.jsonl", ["one two three", "four five six", "seven eight nine"])
    own = write(tmp_path / "own.jsonl", ["Four five six?"])
    filters = {"decontamination": {"files": [{"kind": "files", "name": "own", "paths": [str(own)]}]}}
    plain = prepare_data(small(path), root=root)
    assert prepare_data(small(path, workers=1), root=root).cached
    filtered = prepare_data(small(path, filters=filters), root=root)
    assert filtered.fingerprint != plain.fingerprint
    assert (filtered.result.contaminated, plain.result.contaminated) == (1, 0)
    assert filtered.result.documents == plain.result.documents - 1
    write(own, ["Ten eleven twelve?"])
    again = prepare_data(small(path, filters=filters), root=root)
    assert again.fingerprint != filtered.fingerprint and again.result.contaminated == 0


def test_changed_content_is_prepared_again_and_moved_content_is_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    path = write(tmp_path / "a.jsonl", ["one", "two", "three"])
    first = prepare_data(small(path), root=root)
    assert not first.cached
    moved = path.rename(tmp_path / "b.jsonl")
    assert prepare_data(small(moved), root=root).cached
    write(moved, ["one", "two", "four"])
    changed = prepare_data(small(moved), root=root)
    assert not changed.cached and changed.fingerprint != first.fingerprint
    assert prepare_data(small(moved, seed=1), root=root).fingerprint != changed.fingerprint


def test_the_examples_of_the_docs_fit_a_preset() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    examples = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(examples) == 2
    sources, filters = (resolve_lifecycle(PlanConfig(overrides=json.dumps(example))) for example in examples)
    assert sources.pretrain_long.mixture == {"web": 0.5, "notes": 0.5}
    assert filters.prepare_data.filters.decontamination


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"sources": []}, "sources: "),
        ({"sources": [{"kind": "python_stdlib", "name": "a", "part": "code"}] * 2}, "two sources are named 'a'"),
        ({"vocab_size": 100}, "vocab_size: "),
        ({"validation_share": 0}, "validation_share: "),
        ({"vocabulary_size": 1000}, "did you mean 'vocab_size'"),
        ({"filters": {"near_duplicates": {"treshold": 0.5}}}, "filters.near_duplicates.treshold: .*'threshold'"),
        ({"filters": {"decontamination": {}}}, "filters.decontamination: needs tasks or files"),
        ({"workers": 0}, "workers: "),
        ({"tokenizer_digest": "0" * 64}, "tokenizer_digest: needs tokenizer"),
    ],
)
def test_bad_configs_are_refused(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse(PrepareDataConfig, data, "prepare_data")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the published tokenizer directory."""
    directory = tmp_path_factory.mktemp("published")
    published.write_published(directory, ["47 + 38 = 85\n", "detailed thinking on off HUMAN ASSISTANT SYSTEM"] * 20)
    return directory


def test_a_given_tokenizer_gives_the_corpus_its_ids(given: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two", "three"])
    outcome = prepare_data(small(path, tokenizer=str(given)), root=tmp_path / "root")
    assert outcome.result.vocab_size == 157153
    corpus = Corpus.open(outcome.outputs["corpus"])
    expected = Tokenizer.load(given)
    assert corpus.tokenizer.digest == outcome.manifest.outputs["corpus"].contract["tokenizer"] == expected.digest

    tokens, ends = corpus.tokens("chat"), corpus.document_offsets("chat")[1:] - 1
    assert set(tokens[ends]) == {published.END_OF_TEXT}
    texts = [corpus.tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]
    for mark in ("<role>", "</role>", "<|role_end|>"):
        assert (tokens == expected.token_id(mark)).sum() == sum(text.count(mark) for text in texts) >= 50
    assert max(corpus.tokens("mine")) == published.END_OF_TEXT  # beside ordinary ids

    saved = outcome.outputs["corpus"] / "tokenizer"
    assert json.loads((saved / "generation_config.json").read_text()) == published.GENERATION
    assert json.loads((saved / "special_tokens_map.json").read_text()) == published.NAMES
    stage = resolve_lifecycle(enough_ids(given)).pretrain_short
    model = stage_model(stage, corpus.tokenizer.vocab_size, corpus.tokenizer.eos_id, before=None)
    assert (model.vocab_size, model.eos_token_id, model.pad_token_id) == (157184, 156892, 156892)


def test_the_content_of_a_given_tokenizer_bears_identity(given: Path, tmp_path: Path) -> None:
    root, path = tmp_path / "root", write(tmp_path / "a.jsonl", ["one", "two", "three"])
    trained = prepare_data(small(path), root=root)
    first = prepare_data(small(path, tokenizer=str(given)), root=root)
    assert not first.cached and first.fingerprint != trained.fingerprint
    alone = tmp_path / "moved" / "tokenizer.json"
    alone.parent.mkdir()
    alone.write_bytes((given / "tokenizer.json").read_bytes())
    for moved in (alone, alone.parent, f"file://{alone.parent}/"):
        assert prepare_data(small(path, tokenizer=str(moved)), root=root).cached
    digest = Tokenizer.load(given).digest
    assert prepare_data(small(path, tokenizer=str(given), tokenizer_digest=digest), root=root).cached
    alone.write_text(alone.read_text().replace("unused 500", "used 500"))
    assert not prepare_data(small(path, tokenizer=str(alone)), root=root).cached
    with pytest.raises(UserError, match=f"tokenizer_digest: content is '[0-9a-f]{{64}}', not '{digest}' as given"):
        prepare_data(small(path, tokenizer=str(alone), tokenizer_digest=digest), root=root)
    alone.unlink()
    with pytest.raises(UserError, match=r"moved/tokenizer\.json: no such file; expected a tokenizer directory"):
        prepare_data(small(path, tokenizer=str(alone.parent)), root=root)


def test_a_tokenizer_that_changes_after_its_digest_was_taken_is_refused(given: Path, tmp_path: Path) -> None:
    path, taken = write(tmp_path / "a.jsonl", ["one", "two", "three"]), tmp_path / "tokenizer.json"
    taken.write_bytes((given / "tokenizer.json").read_bytes())
    config = _pinned(small(path, tokenizer=str(taken)))
    assert _given_tokenizer(config)
    taken.write_text(taken.read_text().replace("unused 500", "used 500"))
    with pytest.raises(UserError, match=r"^tokenizer: .*tokenizer\.json has changed since its digest was taken"):
        _given_tokenizer(config)


MODELS = ("wind_tunnel", "fit_scaling_laws", "pretrain_short", "pretrain_mid", "pretrain_long")


def enough_ids(tokenizer: Path) -> PlanConfig:
    overrides: dict[str, Any] = {name: {"model": {"vocab_size": 157184}} for name in MODELS}
    return PlanConfig(overrides=json.dumps({"prepare_data": {"tokenizer": str(tokenizer)}, **overrides}))


def test_models_with_fewer_ids_than_the_tokenizer_are_refused_by_the_plan(
    given: Path, call: Callable[..., Called]
) -> None:
    overrides = ["--set", f"prepare_data.tokenizer={given}", "--set", "pretrain_mid.model.vocab_size=157153"]
    done = call("run", *overrides)
    assert done.code == 2
    small_ones = ", ".join(f"{name}.model.vocab_size" for name in MODELS if name != "pretrain_mid")
    assert f"{small_ones}: must be at least 157153 (token ids of {given})\n" in done.err
    done = call("plan", "--set", "prepare_data.vocab_size=1025")
    assert done.code == 2 and "must be at least 1025 (prepare_data.vocab_size)\n" in done.err
    assert resolve_lifecycle(enough_ids(given)).prepare_data.tokenizer == str(given)


def test_missing_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    sources = json.dumps([{"kind": "files", "name": "mine", "paths": [str(tmp_path / "no.jsonl")]}])
    done = subprocess.run(
        [sys.executable, "-m", "components.prepare_data", "--root", str(tmp_path / "root"), "--sources", sources],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert "no.jsonl: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_declaring_it_imports_nothing_heavy() -> None:
    check = (
        "import sys, components.prepare_data as p; p.PrepareDataConfig(); "
        "assert not {'torch', 'kfp', 'ray', 'mlflow', 'reasoning_gym', 'tokenizers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_the_default_is_enough_for_the_smallest_model(tmp_path: Path) -> None:
    outcome = prepare_data(PrepareDataConfig(), root=tmp_path / "root")
    corpus = Corpus.open(outcome.outputs["corpus"])
    assert corpus.sources == ["python_code", "python_prose", "reasoning_plain", "reasoning_cot", "reasoning_chat"]
    assert 3_000_000 < outcome.result.tokens < 6_000_000
    assert all(len(corpus.tokens(name)) > 400_000 for name in corpus.sources)
    assert all(len(corpus.tokens(name, "validation")) > 5_000 for name in corpus.sources)
    assert outcome.result.vocab_size == 1024
