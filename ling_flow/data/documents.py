"""From a declared source to its documents, always in the same order for the same source, seed and content."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ling_flow.data import chat, reasoning
from ling_flow.data.sources import FilesSource, ReasoningSource, Source, StdlibSource
from ling_flow.errors import UserError

DOCUMENT_CHARACTERS = 4000
"""Texts longer than this are split at blank lines."""
SHORTEST_DOCSTRING = 80
SKIPPED_FOLDERS = {"__pycache__", "config", "dist", "encodings", "idlelib", "pydoc_data", "site", "test", "tests"}
"""Folders of the standard library that are not its own code, or are tables; a name counts up to its first hyphen."""
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}


def documents(source: Source, seed: int) -> Iterator[str]:
    """The documents of `source`, none of them blank.

    Raises:
        UserError: a file is missing or malformed; the line names file and place.
    """
    if isinstance(source, ReasoningSource):
        return _reasoning_documents(source, seed)
    found = _stdlib_documents(source, seed) if isinstance(source, StdlibSource) else _file_documents(source)
    return _bounded((text for text in found if text.strip()), source.max_documents, source.max_characters)


def pin(source: Source) -> Source:
    """`source` with `digest` filled, so that changed content changes the step's fingerprint.

    Raises:
        UserError: a digest was given and the content has another one.
    """
    if isinstance(source, ReasoningSource):
        digest = f"reasoning-gym {metadata.version('reasoning-gym')}"
    elif isinstance(source, StdlibSource):
        listing = "".join(f"{name} {path.stat().st_size}\n" for name, path in _stdlib_files(source))
        digest = f"python {sys.version.split()[0]} {hashlib.sha256(listing.encode()).hexdigest()}"
    else:
        whole = hashlib.sha256()
        for path in _resolve(source):
            with _open(path) as stream:
                whole.update(f"{_format(source, path)} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        digest = f"sha256 {whole.hexdigest()}"
    if source.digest not in (None, digest):
        raise UserError(f"sources.{source.name}.digest: content is {digest!r}, not {source.digest!r} as given")
    return source.model_copy(update={"digest": digest})


def is_rendered(source: Source) -> bool:
    """Whether the documents are in the chat format, their special tokens to be read as such."""
    return isinstance(source, ReasoningSource) and source.style == "chat"


def _bounded(texts: Iterator[str], max_documents: int | None, max_characters: int | None) -> Iterator[str]:
    characters = 0
    for text in islice(texts, max_documents):
        yield text
        characters += len(text)
        if max_characters is not None and characters >= max_characters:
            return


def split_text(text: str) -> Iterator[str]:
    """Pieces of about `DOCUMENT_CHARACTERS`, cut where a blank line is followed by a line that is not indented."""
    piece = ""
    for block in re.split(r"\n\s*\n(?=\S)", text):
        if piece and len(piece) + len(block) > DOCUMENT_CHARACTERS:
            yield piece
            piece = block
        else:
            piece = f"{piece}\n\n{block}" if piece else block
    yield piece


# Python's standard library


def _stdlib_files(source: StdlibSource) -> list[tuple[str, Path]]:
    """(name, path) of the files that give this part. A file's name decides its part: the two share no text."""
    root = Path(sysconfig.get_path("stdlib"))
    wanted = 0 if source.part == "code" else 1
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name.split("-")[0] not in SKIPPED_FOLDERS]
        for path in (Path(folder) / name for name in names):
            relative = path.relative_to(root).as_posix()
            generated = path.name.startswith("_sysconfigdata")  # holds paths of the machine that built this Python
            if path.suffix == ".py" and not generated and hashlib.sha256(relative.encode()).digest()[0] % 2 == wanted:
                files.append((relative, path))
    files.sort()
    if not files:
        raise UserError(f"sources.{source.name}: this Python has no source files in {root}; use a source of kind files")
    return files


def _stdlib_documents(source: StdlibSource, seed: int) -> Iterator[str]:
    units: list[tuple[str, str | Path]] = list(_stdlib_files(source))
    if source.part == "prose":
        from pydoc_data.topics import topics

        units += sorted(topics.items())
    random.Random(f"{seed}/{source.name}").shuffle(units)
    for _, unit in units:
        if isinstance(unit, str):
            yield from split_text(unit)
            continue
        text = unit.read_text(encoding="utf-8", errors="replace")
        yield from split_text(text) if source.part == "code" else _docstrings(text)


def _docstrings(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= SHORTEST_DOCSTRING:
                yield inspect.cleandoc(text)


# The user's files


def _resolve(source: FilesSource) -> list[str]:
    """The files that `source.paths` name: in the order given, a pattern's matches by name."""
    import fsspec

    found: list[str] = []
    for path in source.paths:
        try:
            filesystem, local = fsspec.url_to_fs(path)
            is_pattern = any(character in path for character in "*?[")
            matches = sorted(filesystem.glob(local)) if is_pattern else [local]
            matches = [match for match in matches if filesystem.isfile(match)]
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"sources.{source.name}.paths: {path}: {error}") from None
        if not matches:
            what = "no file matches this pattern" if is_pattern else "no such file"
            raise UserError(f"sources.{source.name}.paths: {path}: {what}")
        found += [filesystem.unstrip_protocol(match) if "://" in path else match for match in matches]
    return found


def _open(path: str) -> Any:
    import fsspec

    try:
        return fsspec.open(path, "rb").open()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _format(source: FilesSource, path: str) -> str:
    if source.format != "auto":
        return source.format
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path}: suffix {suffix!r} tells no format; set sources.{source.name}.format to jsonl, parquet or text"
        )
    return SUFFIXES[suffix]


def _file_documents(source: FilesSource) -> Iterator[str]:
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    for path in _resolve(source):
        with _open(path) as stream:
            yield from readers[_format(source, path)](stream, path, source.text_field)


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
        except ValueError as error:  # bad JSON, or bytes that are not UTF-8
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
        if field not in row:
            raise UserError(f"{path}:{number}: no field '{field}'; it has {', '.join(row) or 'none'}; set text_field")
        yield _checked(row[field], f"{path}:{number}", field)


def _read_parquet(stream: IO[bytes], path: str, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(stream)
        if field not in table.schema_arrow.names:
            raise UserError(
                f"{path}: no column '{field}'; it has {', '.join(table.schema_arrow.names) or 'none'}; set text_field"
            )
        number = 0
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _checked(value, f"{path}: row {number}", field)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a whole parquet file ({' '.join(str(error).split())})") from None


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


# Reasoning problems


def _reasoning_documents(source: ReasoningSource, seed: int) -> Iterator[str]:
    stream = reasoning.problem_stream(source.tasks, f"{seed}/{source.name}", "train")
    modes = random.Random(f"{seed}/{source.name}/thinking")
    for _ in range(source.documents):
        group = list(islice(stream, source.problems_per_document))
        if source.style == "plain":
            yield "\n".join(map(reasoning.plain_text, group))
        elif source.style == "chain_of_thought":
            yield "\n\n".join(map(reasoning.worked_text, group))
        else:
            yield chat.END_OF_TEXT.join(
                _conversation(problem, modes.random() < source.thinking_share) for problem in group
            )


def _conversation(problem: reasoning.Problem, thinking: bool) -> str:
    answer: dict[str, str] = {"role": "assistant", "content": problem.answer}
    if thinking:
        answer["reasoning_content"] = "\n".join(problem.steps)
    return chat.render([{"role": "user", "content": problem.question}, answer], thinking=thinking)
