"""Where the files of a source lie: paths, patterns, fsspec URLs, and the layouts of Hugging Face datasets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ling_flow.data.sources import FilesSource
from ling_flow.errors import SystemFault, UserError

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
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Of JSONL and text; read as they are unpacked."""
OTHER_COMPRESSIONS = {".bz2", ".xz", ".lz4", ".br", ".zip", ".7z", ".z"}
HUB_SHARD = re.compile(r"(?P<start>(?:^|.*/)(?P<split>[^/]+)-)(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet$")
HUB_KEYWORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


@dataclass(frozen=True)
class Place:
    """A file."""

    filesystem: Any
    path: str
    """As the file system names it."""
    name: str
    """As people do: a URL where one was given."""

    def open(self) -> Any:
        return self.filesystem.open(self.path, "rb")

    def size(self) -> int:
        """Bytes; 0 where the file system does not tell."""
        try:
            return int(self.filesystem.size(self.path) or 0)
        except OSError:
            return 0

    def state(self) -> str:
        """What the file system tells of it (size, times, ETag): another one if its content has changed."""
        from fsspec.implementations.local import LocalFileSystem

        is_local = isinstance(self.filesystem, LocalFileSystem)
        path = os.path.realpath(self.path) if is_local else self.path  # a link has times of its own
        self.filesystem.invalidate_cache(path)
        return str(sorted((key, str(value)) for key, value in self.filesystem.info(path).items()))

    def suffix(self) -> tuple[str, str | None]:
        """Its suffix in lower case and, if that is of a compression, the one before and the compression."""
        name = urlsplit(self.name).path if self.name.startswith(("http://", "https://")) else self.name
        suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes[-2:]] or [""]
        if suffixes[-1] in COMPRESSIONS:
            return (suffixes[-2] if len(suffixes) > 1 else ""), COMPRESSIONS[suffixes[-1]]
        return suffixes[-1], None


def format_of(source: FilesSource, place: Place) -> tuple[str, str | None]:
    """How to read a file of `source`: format, and compression if there is one.

    Raises:
        UserError: its name tells no format, or a compression that is not read.
    """
    suffix, compression = place.suffix()
    if suffix in OTHER_COMPRESSIONS:
        raise UserError(f"{place.name}: compressed as {suffix}, which is not read; unpack it, or use .gz or .zst")
    form = SUFFIXES.get(suffix) if source.format in ("auto", "hf_dataset") else source.format
    if form is None:
        raise UserError(
            f"{place.name}: suffix {suffix!r} tells no format; set sources.{source.name}.format to jsonl, parquet or "
            "text"
        )
    if compression and form not in ("jsonl", "text"):
        raise UserError(f"{place.name}: a {form} file within {compression} is not read; unpack it")
    return form, compression


def resolve(source: FilesSource) -> list[Place]:
    """The files that `source.paths` name: in the order given, a pattern's matches by name.

    Raises:
        UserError: a path names nothing, or a pattern matches what cannot be read.
        SystemFault: a store does not answer.
    """
    found: list[Place] = []
    for path in source.paths:
        where = f"sources.{source.name}.paths: {path}"
        try:
            filesystem, local = _file_system(path)
            matches = _matches(source, filesystem, path, local)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:
            raise named(error, where) from None
        for match in matches:
            found.append(Place(filesystem, match, filesystem.unstrip_protocol(match) if "://" in path else match))
    return found


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and how it names the path there."""
    import fsspec

    if "::" in path:
        here = fsspec.filesystem("file")
        if here.exists(path):  # a name with two colons, not a chain of URLs
            return here, here._strip_protocol(path)
    filesystem, local = fsspec.url_to_fs(path)
    return filesystem, local


def _matches(source: FilesSource, filesystem: Any, path: str, local: str) -> list[str]:
    wildcards = "*[" if path.startswith(("http://", "https://")) else "*?["
    is_pattern = any(character in path for character in wildcards) and not filesystem.exists(local)
    matches = sorted(filesystem.glob(local)) if is_pattern else [local]
    if source.format == "hf_dataset":
        folders = [match for match in matches if filesystem.isdir(match)]
        matches = [file for folder in folders for file in _dataset_files(filesystem, folder, source.split)]
    elif is_pattern:
        matches = _readable(filesystem, matches)
    elif filesystem.isdir(local):
        raise UserError("is a directory; give a pattern such as *.parquet, or format hf_dataset")
    elif not filesystem.isfile(local):
        matches = []
    if not matches:
        thing = "directory" if source.format == "hf_dataset" else "file"
        raise UserError(f"no {thing} matches this pattern" if is_pattern else f"no such {thing}")
    return matches


def _readable(filesystem: Any, matches: Sequence[str]) -> list[str]:
    """The files among a pattern's matches; folders are passed over unless they look like data."""
    files = [match for match in matches if filesystem.isfile(match)]
    for match in sorted({*matches} - {*files}):
        if not filesystem.isdir(match):
            raise UserError(f"{match} cannot be read: a link to nothing, or no file; remove it or narrow the pattern")
        if PurePosixPath(match).suffix.lower() in SUFFIXES and not any(file.startswith(f"{match}/") for file in files):
            raise UserError(f"{match} is a directory; name what is in it, as by {match}/*")
    return files


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
    files = [str(file) for file in sorted(filesystem.find(folder)) if str(file).endswith(".parquet")]
    found = {file[len(folder) + 1 :]: file for file in files}
    if not found:
        raise UserError("holds no dataset: neither state.json nor dataset_dict.json (save_to_disk), nor parquet files")
    shards = {name: match["split"] for name in found if (match := HUB_SHARD.match(name))}
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
    _check_shards(chosen)
    return [found[name] for name in chosen]


def _check_shards(names: Sequence[str]) -> None:
    """All that `-of-00012` tells of are there.

    Raises:
        UserError: one is missing.
    """
    there: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := HUB_SHARD.match(name):
            there.setdefault((match["start"], match["total"]), set()).add(int(match["number"]))
    for (start, total), numbers in there.items():
        missing = sorted({*range(int(total))} - numbers)
        if missing:
            raise UserError(
                f"{start}{missing[0]:05d}-of-{total}.parquet is missing ({len(numbers)} of {int(total)} files are "
                "there); fetch the rest, or name the files by a pattern with format parquet"
            )


def named(error: Exception, where: str) -> Exception:
    """What a file or a store says, as one line of a kind; a defect of ours as it is. Every store has its own errors."""
    remote = "://" in where
    if not remote and not isinstance(error, OSError | ImportError | ValueError):
        return error
    reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    wrong = FileNotFoundError | PermissionError | IsADirectoryError | ImportError | ValueError
    if remote and not isinstance(error, wrong) and "Credentials" not in type(error).__name__:
        return SystemFault(f"{where}: cannot be read ({reason}); run again when the store answers")
    return UserError(f"{where}: cannot be read ({reason})")
