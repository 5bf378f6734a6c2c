"""From a declared source to its documents, always in the same order for the same source, seed and content."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path

from ling_flow.data import chat, reasoning
from ling_flow.data.files import Reading, check_contents, file_documents, files_digest, split_text
from ling_flow.data.sources import BoundedSource, FilesSource, ReasoningSource, Source, StdlibSource
from ling_flow.errors import UserError

SHA_256 = "sha256 "
"""Beginning of the digest of files."""
SHORTEST_DOCSTRING = 80
SKIPPED_FOLDERS = {"__pycache__", "config", "dist", "encodings", "idlelib", "pydoc_data", "site", "test", "tests"}
"""Folders of the standard library that are not its own code, or are tables; a name counts up to its first hyphen."""


def documents(source: Source, seed: int, reading: Reading | None = None) -> Iterator[str]:
    """The documents of `source`, none of them blank; `reading` is kept up to date.

    Raises:
        UserError: a file is missing or malformed; the line names file and place.
    """
    reading = reading or Reading()
    if isinstance(source, ReasoningSource):
        return _reasoning_documents(source, seed, reading)
    if isinstance(source, StdlibSource):
        found = _stdlib_documents(source, seed, reading)
    else:
        found = file_documents(source, reading)
    return _bounded((text for text in found if text.strip()), source, reading)


def problems_of(source: FilesSource) -> Iterator[str]:
    """The problems of an evaluation set: its documents, but of a text every line that is not blank.

    Raises:
        UserError: as `documents`.
    """
    reading = Reading()
    found = file_documents(source, reading, by_line=True)
    return _bounded((text for text in found if text.strip()), source, reading)


def check_read(source: Source) -> None:
    """To be called when a pinned source has been read: what was read is what its digest tells of.

    Raises:
        UserError: a file has changed since.
    """
    if isinstance(source, FilesSource) and source.digest is not None:
        check_contents(source, source.digest.removeprefix(SHA_256))


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
        digest = SHA_256 + files_digest(source)
    if source.digest not in (None, digest):
        raise UserError(f"sources.{source.name}.digest: content is {digest!r}, not {source.digest!r} as given")
    return source.model_copy(update={"digest": digest})


def is_rendered(source: Source) -> bool:
    """Whether the documents are in the chat format, their special tokens to be read as such."""
    return isinstance(source, ReasoningSource) and source.style == "chat"


def _bounded(texts: Iterator[str], source: BoundedSource, reading: Reading) -> Iterator[str]:
    characters = 0
    for number, text in enumerate(islice(texts, source.max_documents), start=1):
        characters += len(text)
        if source.max_documents is not None:
            reading.reached(number / source.max_documents)
        if source.max_characters is not None:
            reading.reached(characters / source.max_characters)
        yield text
        if source.max_characters is not None and characters >= source.max_characters:
            return


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


def _stdlib_documents(source: StdlibSource, seed: int, reading: Reading) -> Iterator[str]:
    units: list[tuple[str, str | Path]] = list(_stdlib_files(source))
    if source.part == "prose":
        from pydoc_data.topics import topics

        units += sorted(topics.items())
    random.Random(f"{seed}/{source.name}").shuffle(units)
    for number, (_, unit) in enumerate(units):
        reading.reached(number / len(units))
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


# Reasoning problems


def _reasoning_documents(source: ReasoningSource, seed: int, reading: Reading) -> Iterator[str]:
    stream = reasoning.problem_stream(source.tasks, f"{seed}/{source.name}", "train")
    modes = random.Random(f"{seed}/{source.name}/thinking")
    for number in range(source.documents):
        reading.reached(number / source.documents)
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
