"""Documents of the user's own files: JSONL, Parquet, text, and Hugging Face datasets, local or by fsspec URL."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from ling_flow.data.places import Place, format_of, named, resolve
from ling_flow.data.sources import FilesSource
from ling_flow.errors import LingFlowError, UserError

DOCUMENT_CHARACTERS = 4000
"""Texts longer than this are split at blank lines."""
BATCH_BYTES, BATCH_ROWS = 2**22, 1024
"""Of a column, at once become Python's texts: rows of so many bytes by their average, so many rows at most."""
COLUMN_BYTES = 2**20
"""Of a Parquet column are read from the file at once."""


class Reading:
    """How far a source has been read: `share`, 0 to 1, never falling."""

    def __init__(self) -> None:
        self.share = 0.0

    def reached(self, share: float) -> None:
        self.share = min(max(self.share, share), 1.0)


def split_text(text: str) -> Iterator[str]:
    """Pieces of about `DOCUMENT_CHARACTERS`, cut where a blank line is followed by a line that is not indented."""
    piece = ""
    for block in _blocks(text):
        if piece and len(piece) + len(block) > DOCUMENT_CHARACTERS:
            yield piece
            piece = block
        else:
            piece = f"{piece}\n\n{block}" if piece else block
    yield piece


def _blocks(text: str) -> Iterator[str]:
    """`text` cut at blank lines before lines that are not indented. By runs of white space, which each are looked at
    once: one expression for it all would try every line of a long run as its beginning."""
    begin = 0
    for run in re.finditer(r"\n\s*", text):
        space = run.group()
        if space.endswith("\n") and len(space) > 1 and run.end() < len(text):
            yield text[begin : run.start()]
            begin = run.end()
    yield text[begin:]


def file_documents(source: FilesSource, reading: Reading, *, by_line: bool = False) -> Iterator[str]:
    """The documents of all files, in their order; with `by_line` every line of a text is one that is not blank."""
    readers = {
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "text": _read_lines if by_line else _read_text,
        "arrow": _read_arrow,
    }
    places = resolve(source)
    for number, place in enumerate(places):
        form, compression = format_of(source, place)
        size = place.size()
        try:
            with place.open() as stream, _unpacked(stream, compression, place.name) as unpacked:
                for text in readers[form](unpacked, place.name, source.text_field):
                    # Parquet starts with its end, the footer: never more than the whole file, and never less again.
                    reading.reached((number + min(stream.tell() / size, 1) if size else number) / len(places))
                    yield text
        except LingFlowError:
            raise
        except Exception as error:
            raise named(error, place.name) from None


_digests: dict[str, tuple[str, str]] = {}
"""What `files_digest` found in this process, by the file's name: its state then, its SHA-256."""


def files_digest(source: FilesSource) -> str:
    """SHA-256 over the formats and contents of all files, in their order."""
    whole = hashlib.sha256()
    for place in resolve(source):
        state = _state(place)  # before reading, so that what changes meanwhile differs later
        digest = _sha256(place)
        _digests[place.name] = state, digest
        whole.update(_identity(source, place, digest))
    return whole.hexdigest()


def check_contents(source: FilesSource, expected: str) -> None:
    """To be called when `source` has been read: its content is still that of the `files_digest` `expected`.

    A file whose state is as it was is not read again.

    Raises:
        UserError: a file has changed, come, or gone.
    """
    whole = hashlib.sha256()
    for place in resolve(source):
        state, digest = _digests.get(place.name, ("", ""))
        if state != _state(place):
            now = _sha256(place)
            if digest and now != digest:
                raise UserError(f"{place.name}: has changed while it was read; run again when nothing writes it")
            digest = now
        whole.update(_identity(source, place, digest))
    if whole.hexdigest() != expected:
        raise UserError(
            f"sources.{source.name}: the content of {', '.join(source.paths)} has changed while it was read; run again "
            "when nothing writes there"
        )


def _identity(source: FilesSource, place: Place, digest: str) -> bytes:
    return f"{' '.join(filter(None, format_of(source, place)))} {digest}\n".encode()


def _state(place: Place) -> str:
    try:
        return place.state()
    except Exception as error:
        raise named(error, place.name) from None


def _sha256(place: Place) -> str:
    try:
        with place.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except Exception as error:
        raise named(error, place.name) from None


class _Watched:
    """A stream that remembers what reading it raised: through other libraries that looks like damage to the file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.fault: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, *size: int) -> bytes:
        try:
            return self._stream.read(*size)
        except Exception as error:
            self.fault = error
            raise


@contextlib.contextmanager
def _whole(stream: _Watched, path: str, thing: str) -> Iterator[None]:
    """What is raised within means that `path` is no whole `thing`, unless it is the stream's own fault."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        if stream.fault is not None:
            raise stream.fault from None
        raise UserError(f"{path}: not a whole {thing} ({' '.join(str(error).split())})") from None


@contextlib.contextmanager
def _unpacked(stream: IO[bytes], compression: str | None, path: str) -> Iterator[IO[bytes]]:
    """What a compressed file holds; without `compression` the stream itself."""
    if compression is None:
        yield stream
        return
    watched = _Watched(stream)
    with _whole(watched, path, f"{compression} file"):
        if compression == "gzip":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=watched, mode="rb"))
        else:
            import pyarrow

            yield io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(watched, mode="r"), compression))


def _read_text(stream: IO[bytes], path: str, _: str) -> Iterator[str]:
    return split_text(_decoded(stream, path))


def _read_lines(stream: IO[bytes], path: str, _: str) -> Iterator[str]:
    return (line for line in _decoded(stream, path).split("\n") if line.strip())


def _decoded(stream: IO[bytes], path: str) -> str:
    """A whole text, without a byte order mark and with line ends of one kind."""
    try:
        return stream.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _read_jsonl(stream: IO[bytes], path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # bad JSON, or bytes that are not UTF-8, or too deep
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
        if field not in row:
            raise UserError(f"{path}:{number}: no field '{field}'; it has {', '.join(row) or 'none'}; set text_field")
        yield _checked(row[field], f"{path}:{number}", field)


def _read_parquet(stream: IO[bytes], path: str, field: str) -> Iterator[str]:
    from pyarrow import parquet

    watched = _Watched(stream)
    with _whole(watched, path, "parquet file of UTF-8 texts"):
        table = parquet.ParquetFile(watched, buffer_size=COLUMN_BYTES, pre_buffer=False)
        _require_column(table.schema_arrow.names, path, field)
        batches = table.iter_batches(batch_size=_batch_rows(table.metadata, field), columns=[field], use_threads=False)
        yield from _column_texts((batch.column(0) for batch in batches), path, field)


def _batch_rows(metadata: Any, field: str) -> int:
    """Rows that hold about `BATCH_BYTES` where the texts are longest."""
    longest = 0.0
    for column in (at for at in range(metadata.num_columns) if metadata.schema.column(at).path == field):
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            longest = max(longest, group.column(column).total_uncompressed_size / max(group.num_rows, 1))
    return _rows_at_once(longest)


def _rows_at_once(average: float) -> int:
    """Of rows of so many bytes."""
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(average, 1))))


def _read_arrow(stream: IO[bytes], path: str, field: str) -> Iterator[str]:
    import pyarrow

    watched = _Watched(stream)
    with _whole(watched, path, "Arrow stream of UTF-8 texts"):
        batches = pyarrow.ipc.open_stream(watched)
        _require_column(batches.schema.names, path, field)
        yield from _column_texts((batch.column(field) for batch in batches), path, field)


def _require_column(names: list[str], path: str, field: str) -> None:
    if field not in names:
        raise UserError(f"{path}: no column '{field}'; it has {', '.join(names) or 'none'}; set text_field")


def _column_texts(columns: Iterator[Any], path: str, field: str) -> Iterator[str]:
    number = 0
    for column in columns:
        rows = _rows_at_once(column.nbytes / max(len(column), 1))
        for begin in range(0, len(column), rows):
            for value in column.slice(begin, rows).to_pylist():
                number += 1
                yield _checked(value, f"{path}: row {number}", field)


def _checked(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: field '{field}' holds half of a surrogate pair, which is not valid Unicode"
        ) from None
    return value
