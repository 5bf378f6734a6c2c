import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.prepare_data import PrepareDataConfig, prepare_data
from ling_flow.config import parse
from ling_flow.data.chat import chat_template_digest
from ling_flow.data.corpus import Corpus
from ling_flow.data.reasoning import TaskSpec
from ling_flow.data.sources import FilesSource, ReasoningSource, StdlibSource
from ling_flow.errors import UserError

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


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"sources": []}, "sources: "),
        ({"sources": [{"kind": "python_stdlib", "name": "a", "part": "code"}] * 2}, "two sources are named 'a'"),
        ({"vocab_size": 100}, "vocab_size: "),
        ({"validation_share": 0}, "validation_share: "),
        ({"vocabulary_size": 1000}, "did you mean 'vocab_size'"),
    ],
)
def test_bad_configs_are_refused(data: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse(PrepareDataConfig, data, "prepare_data")


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
