"""Documents of the user's own files: JSONL, Parquet, text, and Hugging Face datasets, local or by fsspec URL."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ling_flow.data.sources import FilesSource
from ling_flow.errors import LingFlowError, SystemFault, UserError

DOCUMENT_CHARACTERS = 4000
"""Texts longer than this are split at blank lines."""
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}
HUB_SHARD = re.compile(r"(?:^|/)(?P<split>[^/]+)-\d{5}-of-\d{5}\.parquet$")
HUB_KEYWORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


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


def file_documents(source: FilesSource, reading: Reading) -> Iterator[str]:
    """The documents of all files, in their order."""
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text, "arrow": _read_arrow}
    paths = _resolve(source)
    for number, path in enumerate(paths):
        size = _size(path)
        try:
            with _open(path) as stream:
                for text in readers[_format(source, path)](stream, path, source.text_field):
                    # Parquet starts with its end, the footer: never more than the whole file, and never less again.
                    reading.reached((number + min(stream.tell() / size, 1) if size else number) / len(paths))
                    yield text
        except LingFlowError:
            raise
        except Exception as error:
            raise _named(error, path) from None


def files_digest(source: FilesSource) -> str:
    """SHA-256 over the formats and contents of all files, in their order."""
    whole = hashlib.sha256()
    for path in _resolve(source):
        try:
            with _open(path) as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except Exception as error:
            raise _named(error, path) from None
        whole.update(f"{_format(source, path)} {digest}\n".encode())
    return whole.hexdigest()


def _resolve(source: FilesSource) -> list[str]:
    """The files that `source.paths` name: in the order given, a pattern's matches by name."""
    import fsspec

    found: list[str] = []
    for path in source.paths:
        where = f"sources.{source.name}.paths: {path}"
        try:
            filesystem, local = fsspec.url_to_fs(path)
            is_pattern = any(character in path for character in "*?[")
            named = sorted(filesystem.glob(local)) if is_pattern else [local]
            if source.format == "hf_dataset":
                folders = [match for match in named if filesystem.isdir(match)]
                matches = [file for folder in folders for file in _dataset_files(filesystem, folder, source.split)]
            else:
                matches = [match for match in named if filesystem.isfile(match)]
            if not matches:
                thing = "directory" if source.format == "hf_dataset" else "file"
                what = f"no {thing} matches this pattern" if is_pattern else f"no such {thing}"
                if thing == "file" and not is_pattern and filesystem.isdir(local):
                    what = "is a directory; give a pattern such as *.parquet, or format hf_dataset"
                raise UserError(what)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:
            raise _named(error, where) from None
        found += [filesystem.unstrip_protocol(match) if "://" in path else match for match in matches]
    return found


def _dataset_files(filesystem: Any, folder: str, split: str | None) -> list[str]:
    """The files of a Hugging Face dataset in `folder`.

    `save_to_disk` writes Arrow streams that `state.json` lists, in a folder per split if `dataset_dict.json` is there.
    On the Hub a dataset is Parquet files; their names tell the split.
    """
    folder = folder.rstrip("/")
    if filesystem.isfile(f"{folder}/dataset_dict.json"):
        splits = _dataset_json(filesystem, f"{folder}/dataset_dict.json", "splits")
        wanted = split or "train"
        if wanted not in splits:
            raise UserError(f"has no split '{wanted}'; it has {', '.join(map(str, splits))}; set split")
        folder, split = f"{folder}/{wanted}", None
    if filesystem.isfile(f"{folder}/state.json"):
        entries = _dataset_json(filesystem, f"{folder}/state.json", "_data_files")
        if split is not None:
            raise UserError(f"is one Dataset, without splits; leave split out (got '{split}')")
        if not all(isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in entries):
            raise UserError(f"{folder}/state.json: '_data_files' must list objects with a 'filename'")
        return [f"{folder}/{entry['filename']}" for entry in entries]
    return _hub_files(filesystem, folder, split or "train")


def _dataset_json(filesystem: Any, path: str, field: str) -> list[Any]:
    try:
        value = json.loads(filesystem.cat_file(path))[field]
    except (ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, list):
        raise UserError(f"{path}: must be a JSON object with a list '{field}', as datasets.save_to_disk writes it")
    return value


def _hub_files(filesystem: Any, folder: str, split: str) -> list[str]:
    """Parquet files of `split`: `train-00000-of-00002.parquet`, else with the split as a word of the path; files whose
    paths name no split at all are `train`."""
    found = {str(file)[len(folder) + 1 :]: str(file) for file in sorted(filesystem.glob(f"{folder}/**/*.parquet"))}
    if not found:
        raise UserError("holds no dataset: neither state.json nor dataset_dict.json (save_to_disk), nor parquet files")
    shards = {name: match["split"] for name in found if (match := HUB_SHARD.search(name))}
    words = {name: re.split(r"[-._ 0-9/]+", name) for name in found}
    if len(shards) == len(found):
        chosen = [name for name in found if shards[name] == split]
    elif any(keyword in parts for parts in words.values() for keyword in (*HUB_KEYWORDS, split)):
        chosen = [name for name in found if split in words[name]]
    else:
        chosen = list(found) if split == "train" else []
    if not chosen:
        known = f"; it has {', '.join(sorted(set(shards.values())))}" if shards else ""
        raise UserError(f"has no parquet files of split '{split}'{known}; set split")
    folders = sorted({name.rpartition("/")[0] for name in chosen})
    if len(folders) > 1:
        raise UserError(
            f"holds split '{split}' in several folders ({', '.join(folders[:3])}{', …' if len(folders) > 3 else ''}); "
            "name one of them, or all by a pattern with format parquet"
        )
    return [found[name] for name in chosen]


def _open(path: str) -> Any:
    import fsspec

    return fsspec.open(path, "rb").open()


def _named(error: Exception, where: str) -> Exception:
    """What a file or a store says, as one line of a kind; a defect of ours as it is. Every store has its own errors."""
    remote = "://" in where
    if not remote and not isinstance(error, OSError | ImportError | ValueError):
        return error
    reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    wrong = FileNotFoundError | PermissionError | IsADirectoryError | ImportError | ValueError
    if remote and not isinstance(error, wrong) and "Credentials" not in type(error).__name__:
        return SystemFault(f"{where}: cannot be read ({reason}); run again when the store answers")
    return UserError(f"{where}: cannot be read ({reason})")


def _size(path: str) -> int:
    """Bytes of a file; 0 where the file system does not tell."""
    import fsspec

    try:
        filesystem, local = fsspec.url_to_fs(path)
        return int(filesystem.size(local) or 0)
    except OSError:
        return 0


def _format(source: FilesSource, path: str) -> str:
    if source.format not in ("auto", "hf_dataset"):
        return source.format
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path}: suffix {suffix!r} tells no format; set sources.{source.name}.format to jsonl, parquet or text"
        )
    return SUFFIXES[suffix]


def _read_text(stream: IO[bytes], path: str, _: str) -> Iterator[str]:
    try:
        return split_text(stream.read().decode())
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


class _Watched:
    """A stream that remembers what reading it raised: through Arrow that looks like damage to the file."""

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


def _read_parquet(stream: IO[bytes], path: str, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    watched = _Watched(stream)
    try:
        table = parquet.ParquetFile(watched)
        _require_column(table.schema_arrow.names, path, field)
        columns = (batch.column(0) for batch in table.iter_batches(columns=[field]))
        yield from _column_texts(columns, path, field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if watched.fault is not None:
            raise watched.fault from None
        raise UserError(f"{path}: not a whole parquet file of UTF-8 texts ({' '.join(str(error).split())})") from None


def _read_arrow(stream: IO[bytes], path: str, field: str) -> Iterator[str]:
    import pyarrow

    watched = _Watched(stream)
    try:
        batches = pyarrow.ipc.open_stream(watched)
        _require_column(batches.schema.names, path, field)
        yield from _column_texts((batch.column(field) for batch in batches), path, field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if watched.fault is not None:
            raise watched.fault from None
        raise UserError(f"{path}: not a whole Arrow stream of UTF-8 texts ({' '.join(str(error).split())})") from None


def _require_column(names: list[str], path: str, field: str) -> None:
    if field not in names:
        raise UserError(f"{path}: no column '{field}'; it has {', '.join(names) or 'none'}; set text_field")


def _column_texts(columns: Iterator[Any], path: str, field: str) -> Iterator[str]:
    number = 0
    for column in columns:
        for value in column.to_pylist():
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
