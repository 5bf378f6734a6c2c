import json
import os
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFile
from pyarrow import parquet
from pydantic import TypeAdapter
from s3fs import S3FileSystem

from ling_flow.config import identity_of
from ling_flow.data.chat import parse_completion
from ling_flow.data.documents import check_read, documents, is_rendered, pin
from ling_flow.data.files import DOCUMENT_CHARACTERS, split_text
from ling_flow.data.reasoning import Problem, TaskSpec, is_held_out
from ling_flow.data.sources import FilesSource, ReasoningSource, Source, StdlibSource
from ling_flow.errors import SystemFault, UserError

SUMS = [TaskSpec(name="chain_sum", difficulties=(1, 2, 3))]


def files(*paths: Path | str, **fields: Any) -> FilesSource:
    return FilesSource(name="mine", paths=[str(path) for path in paths], **fields)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# The user's files


def test_formats_by_suffix(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}, {"text": "two", "n": 1}])
    table = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["three", "four"]}), table)
    prose = tmp_path / "c.md"
    prose.write_text("five\n\nsix")
    assert list(documents(files(lines, table, prose), seed=0)) == ["one", "two", "three", "four", "five\n\nsix"]


def test_text_field_format_globs_and_urls(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.log", [{"body": name}])
    expected = ["a", "b"]
    for path in (tmp_path / "*.log", f"file://{tmp_path}/*.log"):
        assert list(documents(files(path, format="jsonl", text_field="body"), seed=0)) == expected


def test_any_fsspec_file_system() -> None:
    import fsspec

    with fsspec.open("memory://bucket/x.txt", "wb") as stream:
        stream.write(b"from memory")
    assert list(documents(files("memory://bucket/*.txt"), seed=0)) == ["from memory"]
    assert pin(files("memory://bucket/x.txt")).digest


def test_bounds(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 10}] * 9)
    assert len(list(documents(files(path, max_documents=4), seed=0))) == 4
    assert len(list(documents(files(path, max_characters=25), seed=0))) == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a"}\n\n{"text": ', r"a\.jsonl:3: not valid JSON"),
        ('{"text": "a"}\n["b"]', r"a\.jsonl:2: must be a JSON object, not list"),
        ('{"body": "a", "n": 1}', r"a\.jsonl:1: no field 'text'; it has body, n; set text_field"),
        ('{"text": 3}', r"a\.jsonl:1: field 'text' must be text, not int"),
        ("[" * 200_000, r"a\.jsonl:1: not valid JSON"),
        (r'{"text": "\ud800"}', r"a\.jsonl:1: field 'text' holds half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=complaint):
        list(documents(files(tmp_path / "a.jsonl"), seed=0))


def test_bad_files_are_named(tmp_path: Path) -> None:
    def complaint(source: FilesSource) -> str:
        with pytest.raises(UserError) as caught:
            list(documents(source, seed=0))
        return str(caught.value)

    assert complaint(files(tmp_path / "no.txt")) == f"sources.mine.paths: {tmp_path / 'no.txt'}: no such file"
    assert "no file matches this pattern" in complaint(files(tmp_path / "*.txt"))
    assert "nowhere://x" in complaint(files("nowhere://x"))
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    assert "a.bin: suffix '.bin' tells no format" in complaint(files(tmp_path / "a.bin"))
    assert "a.bin: not UTF-8 text (byte 0)" in complaint(files(tmp_path / "a.bin", format="text"))
    assert "a.bin: not a whole parquet file" in complaint(files(tmp_path / "a.bin", format="parquet"))
    assert "a.bin:1: not valid JSON" in complaint(files(tmp_path / "a.bin", format="jsonl"))
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    assert "b.parquet: no column 'text'; it has body" in complaint(files(tmp_path / "b.parquet"))
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "c.parquet")
    assert "c.parquet: row 2: field 'text' must be text" in complaint(files(tmp_path / "c.parquet"))
    latin = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "e.parquet")
    assert "e.parquet: not a whole parquet file of UTF-8 texts" in complaint(files(tmp_path / "e.parquet"))


def test_text_has_no_byte_order_mark_and_one_kind_of_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo\r\n".encode())
    assert list(documents(files(tmp_path / "a.txt"), seed=0)) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_long_rows_become_text_a_few_at_a_time(tmp_path: Path, form: str) -> None:
    rng = random.Random(0)
    table = pyarrow.table({"text": [rng.randbytes(10_000).hex() for _ in range(1000)]})
    source = files(tmp_path / "a.parquet")
    if form == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
        source = files(tmp_path, format="hf_dataset")
    tracemalloc.start()
    try:
        assert sum(map(len, documents(source, seed=0))) == 20_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30_000_000  # what Arrow read, and not all of it as text besides


def test_a_store_that_is_away_or_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"^sources\.mine\.paths: s3://bucket/a\.jsonl: cannot be read \(.*redentials"):
        pin(files("s3://bucket/a.jsonl"))
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(SystemFault, match=r"^sources\.mine\.paths: s3://other/a\.jsonl: cannot be read \(.*run again"):
        pin(files("s3://other/a.jsonl"))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_store_that_goes_away_within_a_file_is_not_damage(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pyarrow.table({"text": [f"{number} " * 1000 for number in range(200)]})
    with fsspec.open(f"memory://away/x.{form}", "wb") as stream:
        if form == "parquet":
            parquet.write_table(table, stream, row_group_size=10, compression="none")
        else:
            with pyarrow.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table, max_chunksize=10)
    read = MemoryFile.read
    reads = 0

    def fail_later(file: MemoryFile, size: int = -1) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 1:  # footer or schema still come
            raise ConnectionError("connection reset by peer")
        return read(file, size)

    monkeypatch.setattr(MemoryFile, "read", fail_later)
    with pytest.raises(SystemFault, match=rf"memory:///away/x\.{form}: cannot be read \(connection reset.*run again"):
        list(documents(files(f"memory://away/x.{form}"), seed=0))


def test_pin_follows_content_and_not_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    pinned = pin(files(path))
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "b.jsonl")
    assert identity_of(pin(files(moved))) == identity_of(pinned)
    assert pin(pinned.model_copy(update={"paths": [str(moved)]})) == pin(files(moved))
    write_jsonl(moved, [{"text": "two"}])
    assert pin(files(moved)).digest != pinned.digest
    with pytest.raises(UserError, match=r"sources\.mine\.digest: content is 'sha256 .*', not 'sha256 .*' as given"):
        pin(pinned.model_copy(update={"paths": [str(moved)]}))


def test_content_that_changes_after_its_digest_was_taken_is_refused(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}] * 3) for name in "ab"]
    link = tmp_path / "c.jsonl"
    link.symlink_to(paths[1])
    pinned = pin(files(paths[0], link))
    check_read(pinned)
    os.utime(paths[0], (1, 1))
    check_read(pinned)  # touched, but the same
    paths[1].write_text(paths[1].read_text().replace("b", "x"))  # of the same size
    with pytest.raises(UserError, match=r"^[^ ]*c\.jsonl: has changed while it was read; run again when nothing"):
        check_read(pinned)
    pinned = pin(files(tmp_path / "*.jsonl"))
    write_jsonl(tmp_path / "d.jsonl", [{"text": "late"}])
    with pytest.raises(UserError, match=r"^sources\.mine: the content of .*\*\.jsonl has changed while it was read"):
        check_read(pinned)
    check_read(files(tmp_path / "*.jsonl"))  # held to no digest


# The standard library


def test_stdlib_gives_code_and_prose_that_share_nothing() -> None:
    code_source = StdlibSource(name="code", part="code", max_characters=300_000)
    prose_source = StdlibSource(name="prose", part="prose", max_characters=100_000)
    code, prose = (list(documents(source, seed=0)) for source in (code_source, prose_source))
    assert sum(map(len, code)) >= 300_000 and sum(map(len, prose)) >= 100_000
    assert sum("\ndef " in text or "\nclass " in text or "    def " in text for text in code) > len(code) / 3
    everything = "\n".join(documents(StdlibSource(name="code", part="code"), seed=0))
    docstrings = [line for text in prose for line in text.splitlines() if len(line) > 75]
    assert sum(line in everything for line in docstrings) < len(docstrings) / 20


def test_stdlib_order_is_drawn_from_the_seed() -> None:
    source = StdlibSource(name="code", part="code", max_documents=20)
    first = list(documents(source, seed=1))
    assert len(first) == 20
    assert first == list(documents(source, seed=1)) != list(documents(source, seed=2))


def test_stdlib_digest_names_the_python() -> None:
    digests = [pin(StdlibSource(name="x", part=part)).digest for part in ("code", "prose")]
    assert digests[0] != digests[1]
    assert all(digest and digest.startswith(f"python {sys.version.split()[0]} ") for digest in digests)


def test_long_runs_of_blank_lines_take_no_longer_than_text() -> None:
    text = "a" + "\n" * 300_000 + "b" + "\n" * 300_000 + " c"
    assert list(split_text(text)) == ["a", text[300_001:]]


def test_split_text() -> None:
    block = "def f():\n    a = 1\n\n    return a"
    pieces = list(split_text("\n\n\n".join([block] * 1000)))
    assert all(piece.startswith("def f") and piece.endswith("return a") for piece in pieces)
    assert all(len(piece) < DOCUMENT_CHARACTERS + 2 * len(block) for piece in pieces)
    assert sum(piece.count("def f") for piece in pieces) == 1000


# Reasoning problems


def reasoning_source(style: Any, **fields: Any) -> ReasoningSource:
    return ReasoningSource(name="r", tasks=SUMS, style=style, documents=40, problems_per_document=3, **fields)


def test_plain_documents_hold_several_true_sums() -> None:
    found = list(documents(reasoning_source("plain"), seed=0))
    assert len(found) == 40
    for line in (line for text in found for line in text.split("\n")):
        expression, answer = line.split(" = ")
        assert eval(expression) == int(answer)
        assert not is_held_out(Problem(f"{expression} = ?", [], answer, "chain_sum", 1))
    assert all(text.count("\n") == 2 for text in found)


def test_chain_of_thought_documents_lead_to_the_answer() -> None:
    for text in documents(reasoning_source("chain_of_thought"), seed=0):
        for worked in text.split("\n\n"):
            question, *steps, answer = worked.split("\n")
            assert steps[-1].split(" = ")[1] == answer.removeprefix("Answer: ")
            assert eval(question.removesuffix(" = ?")) == int(answer.removeprefix("Answer: "))


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_chat_documents_think_only_where_told(share: float) -> None:
    source = reasoning_source("chat", thinking_share=share)
    assert is_rendered(source) and not is_rendered(reasoning_source("plain"))
    conversations = [talk for text in documents(source, seed=0) for talk in text.split("<|endoftext|>")]
    assert len(conversations) == 120
    thinking = 0
    for talk in conversations:
        head, completion = talk.split("<role>ASSISTANT</role>")
        question = head.split("<role>HUMAN</role>")[1].removesuffix("<|role_end|>")
        reasoning, answer = parse_completion(completion)
        assert eval(question.removesuffix(" = ?")) == int(answer)
        assert (reasoning is not None) == ("detailed thinking on<|role_end|>" in head)
        thinking += reasoning is not None
    assert abs(thinking / 120 - share) < 0.15


def test_sources_of_other_names_hold_other_problems() -> None:
    one = reasoning_source("plain")
    other = one.model_copy(update={"name": "other"})
    state = random.getstate()
    assert list(documents(one, seed=0)) == list(documents(one, seed=0)) != list(documents(other, seed=0))
    assert random.getstate() == state
    assert (pin(one).digest or "").startswith("reasoning-gym ")


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "files", "name": "a/b", "paths": ["x"]},
        {"kind": "files", "name": "a", "paths": []},
        {"kind": "other", "name": "a"},
        {"kind": "python_stdlib", "name": "a", "part": "tests"},
        {"kind": "reasoning", "name": "a", "tasks": [], "documents": 1, "style": "plain"},
    ],
)
def test_bad_declarations_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TypeAdapter(Source).validate_python(data)
