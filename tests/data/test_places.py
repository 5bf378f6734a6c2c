"""Names of files as they come: with signs of patterns, compressed, or leading nowhere."""

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from pyarrow import parquet

from ling_flow.data.documents import documents, pin
from ling_flow.data.places import Place, format_of
from ling_flow.data.sources import FilesSource
from ling_flow.errors import SystemFault, UserError


def files(*paths: Path | str, **fields: Any) -> FilesSource:
    return FilesSource(name="mine", paths=[str(path) for path in paths], **fields)


def read(*paths: Path | str, **fields: Any) -> list[str]:
    source = files(*paths, **fields)
    assert pin(source).digest
    return list(documents(source, seed=0))


def complaint(*paths: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*paths, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize("name", ["data[1].jsonl", "what?.jsonl", "all*.jsonl", "a::b.jsonl", "100% é.jsonl"])
def test_a_file_of_that_very_name_comes_before_a_pattern(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(lines("itself"))
    (tmp_path / "data1.jsonl").write_bytes(lines("another"))
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path / name) == read(name) == ["itself"]
    assert read("data[12].jsonl") == ["another"]


def test_a_dataset_in_a_folder_with_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "set[v1]" / "data"
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": ["hub"]}), folder / "train-00000-of-00001.parquet")
    assert read(folder.parent, format="hf_dataset") == ["hub"]


def test_a_query_is_no_pattern_and_no_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://example.org/x.jsonl?download=true"
    asked = []

    class Site(MemoryFileSystem):
        def _is(self, path: str) -> bool:
            asked.append(path)
            return path == url

        exists = isfile = _is

        def isdir(self, path: str) -> bool:
            return False

        def glob(self, path: str, **_: Any) -> list[str]:
            raise AssertionError(path)

        def unstrip_protocol(self, name: str) -> str:
            return name

        def open(self, path: str, mode: str = "rb", **_: Any) -> MemoryFile:
            return MemoryFile(self, path, lines("from afar"))

        def size(self, path: str) -> int:
            return len(lines("from afar"))

    monkeypatch.setattr(fsspec, "url_to_fs", lambda path: (Site(), path))
    assert list(documents(files(url), seed=0)) == ["from afar"]
    assert asked == [url]
    monkeypatch.setattr(Site, "isfile", lambda self, path: False)
    with pytest.raises(UserError, match=r"x\.jsonl\?download=true: no such file"):
        list(documents(files(url), seed=0))


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_compressed_lines_and_texts(tmp_path: Path, suffix: str, pack: Any) -> None:
    texts = [f"document {number}" for number in range(1000)]
    whole = pack(lines(*texts[:500])) + pack(lines(*texts[500:]))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole)
    (tmp_path / f"b.txt.{suffix}").write_bytes(pack(b"one\n"))
    assert read(path, tmp_path / f"b.txt.{suffix}") == [*texts, "one\n"]
    assert read(path, max_documents=3) == texts[:3]
    (tmp_path / "plain.jsonl").write_bytes(lines("one"))
    path.write_bytes(lines("one"))
    assert pin(files(path)).digest != pin(files(tmp_path / "plain.jsonl")).digest
    kind = "gzip" if suffix == "gz" else "zstd"
    assert f"{path}: not a whole {kind} file" in complaint(path)
    path.write_bytes(whole[:-20])
    assert f"{path}: not a whole {kind} file" in complaint(path)
    (tmp_path / f"c.parquet.{suffix}").write_bytes(b"")
    assert f"a parquet file within {kind} is not read" in complaint(tmp_path / f"c.parquet.{suffix}")
    (tmp_path / f"d.{suffix}").write_bytes(b"")
    assert "tells no format" in complaint(tmp_path / f"d.{suffix}")


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_store_that_goes_away_within_a_compressed_file_is_not_damage(
    suffix: str, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fsspec.open(f"memory://gone/x.jsonl.{suffix}", "wb") as stream:
        stream.write(pack(lines("one")))

    def away(file: MemoryFile, size: int = -1) -> bytes:
        raise ConnectionError("connection reset by peer")

    monkeypatch.setattr(MemoryFile, "read", away)
    with pytest.raises(SystemFault, match=rf"x\.jsonl\.{suffix}: cannot be read \(connection reset.*run again"):
        list(documents(files(f"memory://gone/x.jsonl.{suffix}"), seed=0))


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.bz2").write_bytes(b"")
    for form in ("auto", "jsonl"):
        assert "a.jsonl.bz2: compressed as .bz2, which is not read; unpack it" in complaint(
            tmp_path / "a.jsonl.bz2", format=form
        )


def test_what_a_pattern_finds_and_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    (tmp_path / "notes").mkdir()
    assert read(tmp_path / "*") == ["one"]  # folders in general are passed over
    gone = tmp_path / "b.jsonl"
    gone.symlink_to(tmp_path / "nowhere")
    assert f"*.jsonl: {gone} cannot be read: a link to nothing" in complaint(tmp_path / "*.jsonl")
    gone.unlink()
    spark = tmp_path / "part.parquet"
    spark.mkdir()
    parquet.write_table(pyarrow.table({"text": ["within"]}), spark / "0.parquet")
    assert f"*: {spark} is a directory; name what is in it, as by {spark}/*" in complaint(tmp_path / "*")
    assert read(tmp_path / "**" / "*.parquet") == read(spark / "*") == ["within"]


def test_suffixes() -> None:
    def form(name: str, **fields: Any) -> tuple[str, str | None]:
        return format_of(files("x", **fields), Place(None, name, name))

    assert form("/v1.2/a.b.JSONL.GZ") == ("jsonl", "gzip")
    assert form("/a.gz", format="text") == ("text", "gzip")
    assert form("https://example.org/a.parquet?x=b.txt") == ("parquet", None)
