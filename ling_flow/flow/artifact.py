"""Artifacts: directories `<root>/<component>/<fingerprint>/` that hold `manifest.json` and one directory per output.

A step's outputs grow in `<fingerprint>.partial/`, are hashed and synced, and become the artifact by one rename: an
artifact is there whole or not at all. On an object store the step works in a local cache; files are uploaded and the
manifest goes last, as commit mark. A store that is away for some minutes delays an upload or a download and does not
end it. Reading an output verifies each of its files; where a rebuild replaces it under a reader, the digest
of its content tells. A reference to an output is the text `<root>/<component>/<fingerprint>/<output>`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling_flow.config import StrictModel, parse
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import events

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"  # in a partial directory: what it was begun for
PATIENCE_SECONDS = 300.0  # an object store may be away for so long while files are copied
RETRY_SECONDS = (1.0, 15.0)  # first and longest pause before another try


class File(StrictModel):
    """One file of an artifact; `path` is relative to the artifact's directory, `size` in bytes."""

    path: str
    size: int
    sha256: str


class Parent(StrictModel):
    """An input as it was given: where it was read from, its identity `<fingerprint>/<output>`, and what it held."""

    ref: str
    fingerprint: str
    digest: str = ""  # of its content; "" in older manifests, which did not record it


class OutputRecord(StrictModel):
    """What an output is: its kind (`system.Model`) and what its consumers must agree with."""

    kind: str
    contract: dict[str, Any]


class Manifest(StrictModel):
    """The record beside an artifact's files."""

    schema_version: int
    component: str
    label: str
    version: int
    fingerprint: str
    config: dict[str, Any]
    identity: dict[str, Any]
    inputs: dict[str, Parent]
    outputs: dict[str, OutputRecord]
    result: dict[str, Any]
    files: list[File]
    code_version: str
    created: str
    seconds: float


def content_digest(manifest: Manifest, output: str) -> str:
    """SHA-256 over names and digests of an output's files."""
    lines = [f"{file.path} {file.sha256}" for file in manifest.files if file.path.split("/", 1)[0] == output]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def changed_input(manifest: Manifest, contents: Mapping[str, str]) -> str:
    """Why an artifact does not come from what its inputs hold now, "" where it does.

    Args:
        contents: input name → `content_digest` of the output that is its input.
    """
    for name, parent in manifest.inputs.items():
        if not parent.digest:
            return f"what its input {name} held was not recorded"
        if parent.digest != contents.get(name):
            return f"input {name} was rebuilt with other content"
    return ""


@dataclass(frozen=True)
class Ref:
    """A reference to an output, taken apart."""

    root: str
    component: str
    fingerprint: str
    output: str

    @staticmethod
    def parse(text: str | Path) -> Ref:
        """
        Raises:
            UserError: the text is not `<root>/<component>/<fingerprint>/<output>`.
        """
        parts = normal_root(str(text)).rsplit("/", 3)
        if len(parts) != 4 or not all(parts[1:]):
            raise UserError(f"{text}: not a step's output; expected <root>/<component>/<fingerprint>/<output>")
        return Ref(*parts)

    def __str__(self) -> str:
        return f"{self.root}/{self.component}/{self.fingerprint}/{self.output}"


_held: set[int] = set()  # descriptors of the locks that this process holds


def _forget_locks() -> None:
    """In a forked child: it must not go on holding what its parent, which may be killed, has locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def normal_root(root: str) -> str:
    """Local paths become absolute, URLs keep their scheme; no slash at the end."""
    root = root.removeprefix("file://")
    root = root.rstrip("/") or root[:1]
    return root if "://" in root else os.path.abspath(os.path.expanduser(root))


class ArtifactStore:
    """The artifacts below `root`, a local directory or an fsspec URL; `cache` is where copies of remote ones lie."""

    def __init__(self, root: str | Path, cache: Path) -> None:
        self.root = normal_root(str(root))
        self.remote: Any = None
        if "://" in self.root:
            self.remote = _file_system(self.root)
            self.local = cache / hashlib.sha256(self.root.encode()).hexdigest()[:12]
        else:
            self.local = Path(self.root)

    def ref(self, component: str, fingerprint: str, output: str) -> str:
        return str(Ref(self.root, component, fingerprint, output))

    def manifest(self, component: str, fingerprint: str, patient: bool = False) -> Manifest | None:
        """The manifest of an artifact, None where there is no such artifact.

        Args:
            patient: wait for an object store that is away, as when files are copied.

        Raises:
            UserError: the manifest is there but damaged, or is none of a step.
        """
        where = f"{self.root}/{component}/{fingerprint}/{MANIFEST}"
        try:
            text = self._read_remote(where, patient) if self.remote else Path(where).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError:
            raise UserError(f"{where}: damaged, not text; delete the directory {component}/{fingerprint}") from None
        except IsADirectoryError:
            raise UserError(f"{where}: is a directory; delete the directory {component}/{fingerprint}") from None
        if is_foreign(text, fingerprint):
            raise UserError(f"{where}: is no manifest of a step, so {component}/{fingerprint} is no step's artifact")
        try:
            manifest = parse(Manifest, text, where)
        except UserError as error:
            raise UserError(
                f"{error}; damaged or of another version: delete the directory {component}/{fingerprint}"
            ) from None
        if manifest.schema_version != SCHEMA_VERSION:
            raise UserError(f"{where}: schema_version {manifest.schema_version}, but this code reads {SCHEMA_VERSION}")
        if (manifest.component, manifest.fingerprint) != (component, fingerprint):
            raise UserError(
                f"{where}: belongs to {manifest.component}/{manifest.fingerprint}; was the directory renamed?"
            )
        return manifest

    def check_sizes(self, manifest: Manifest) -> None:
        """The cheap check: every file is there and has its size.

        Raises:
            UserError: one is not; the message names it and what to do.
        """
        directory = f"{self.root}/{manifest.component}/{manifest.fingerprint}"
        if self.remote:
            prefix = self.remote._strip_protocol(directory)
            with _remote_errors(directory):
                listing = self.remote.find(prefix, detail=True)
            sizes = {name.removeprefix(prefix).lstrip("/"): info["size"] for name, info in listing.items()}
            for file in manifest.files:
                _check_size(file, sizes.get(file.path), directory, manifest)
            return
        for file in manifest.files:
            path = Path(directory, file.path)
            _check_size(file, path.stat().st_size if path.is_file() else None, directory, manifest)

    def open(self, component: str, fingerprint: str, output: str) -> tuple[Path, Manifest]:
        """The verified local directory of an output (remote ones are copied to the cache) and its artifact's manifest.

        Raises:
            UserError: there is no such output, or one of its files is missing or damaged.
        """
        manifest = self.manifest(component, fingerprint)
        if manifest is None:
            raise UserError(f"{self.ref(component, fingerprint, output)}: no such artifact (no {MANIFEST} above it)")
        if output not in manifest.outputs:
            known = ", ".join(manifest.outputs) or "none"
            raise UserError(f"{self.root}/{component}/{fingerprint}: has no output '{output}'; outputs: {known}")
        directory = self.local / component / fingerprint
        files = [file for file in manifest.files if file.path.split("/", 1)[0] == output]
        for file in files:
            self._verify(file, directory, manifest)
        path = directory / output
        path.mkdir(parents=True, exist_ok=True)  # an output without files
        if self.remote:  # what a build before has left in the cache is not part of this one
            listed = {directory / file.path for file in files}
            for stale in [found for found in path.rglob("*") if not found.is_dir() and found not in listed]:
                stale.unlink(missing_ok=True)
        return path, manifest

    @contextlib.contextmanager
    def lock(self, component: str, fingerprint: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """One process of this machine makes a given artifact, others wait. The kernel frees a killed process's lock,
        also where children that it forked live on.
        """
        directory = self.local / ".locks"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / f"{component}-{fingerprint}", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.local}: cannot be used as artifact root ({error.strerror})") from None
        _held.add(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            if descriptor in _held:  # not so in a child that leaves by this way
                _held.remove(descriptor)
                os.close(descriptor)

    def partial(self, component: str, fingerprint: str) -> Path:
        """Where an artifact grows."""
        return self.local / component / f"{fingerprint}.partial"

    def describe_files(self, component: str, fingerprint: str) -> list[File]:
        """Hash and sync everything in the partial directory.

        Raises:
            UserError: it holds what an artifact cannot.
        """
        directory = self.partial(component, fingerprint)
        (directory / MANIFEST).unlink(missing_ok=True)  # of an earlier try, which could not be uploaded
        files = []
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            shown = os.fsencode(name).decode(errors="backslashreplace")
            if shown != name:
                raise UserError(f"{directory}/{shown}: a file name of an output must be UTF-8")
            if path.is_symlink():
                raise UserError(f"{path}: an output holds files and directories, not symbolic links")
            if path.is_file() and path != directory / BEGUN:
                with path.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                    os.fsync(stream.fileno())
                files.append(File(path=name, size=path.stat().st_size, sha256=digest))
        return files

    def commit(self, manifest: Manifest) -> None:
        """The partial directory becomes the artifact, in place of an older one. It is uploaded first: if that fails, a
        resumable step still has what it made.

        Raises:
            SystemFault: the object store was away for too long, or refuses.
        """
        partial = self.partial(manifest.component, manifest.fingerprint)
        final = partial.with_name(manifest.fingerprint)
        text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with (partial / MANIFEST).open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        for directory, _, _ in os.walk(partial):
            _sync_directory(Path(directory))
        if self.remote:
            self._upload(manifest, partial)
        (partial / BEGUN).unlink(missing_ok=True)
        old = partial.with_name(f"{manifest.fingerprint}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        _sync_directory(final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _upload(self, manifest: Manifest, directory: Path) -> None:
        target = f"{self.root}/{manifest.component}/{manifest.fingerprint}"

        def remove_manifest() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.remote.rm_file(f"{target}/{MANIFEST}")

        with _remote_errors(target):
            _patiently(target, remove_manifest)  # first, so that a broken upload leaves no half-old artifact
            for name in [*(file.path for file in manifest.files), MANIFEST]:
                try:
                    _patiently(f"{target}/{name}", self.remote.put_file, str(directory / name), f"{target}/{name}")
                except FileNotFoundError as error:
                    raise SystemFault(f"{target}/{name}: cannot be written ({error}); is its bucket there?") from None

    def _verify(self, file: File, directory: Path, manifest: Manifest) -> None:
        """See that a file is in `directory` and whole; where the artifact is remote, copy it there first."""
        path = directory / file.path
        shown = f"{self.root}/{manifest.component}/{manifest.fingerprint}"
        if self.remote and not (path.is_file() and path.stat().st_size == file.size and _digest(path) == file.sha256):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Processes of containers that share the cache may have the same id.
            downloads = self.local / ".downloads"
            downloads.mkdir(exist_ok=True)
            temporary = downloads / uuid.uuid4().hex
            try:
                where = f"{shown}/{file.path}"
                with _remote_errors(where):
                    _patiently(where, self.remote.get_file, where, str(temporary))
                temporary.rename(path)
            except FileNotFoundError:
                path.unlink(missing_ok=True)
            finally:
                temporary.unlink(missing_ok=True)
        _check_size(file, path.stat().st_size if path.is_file() else None, shown, manifest)
        if _digest(path) != file.sha256:
            raise UserError(
                f"{shown}/{file.path}: damaged, its SHA-256 differs from the manifest's; {_remedy(manifest)}"
            )

    def _read_remote(self, where: str, patient: bool) -> str:
        with _remote_errors(where):
            read = self.remote.cat_file
            content: bytes = _patiently(where, read, where) if patient else read(where)
            return content.decode()


def is_foreign(text: str | bytes, directory: str) -> bool:
    """Whether a manifest in a directory of that name was written by something else: many tools call a file so."""
    try:
        data = json.loads(text)
    except ValueError:  # where the name is that of an artifact, a damaged one
        return not re.fullmatch("[0-9a-f]{16}", directory)
    return not (isinstance(data, dict) and {"component", "fingerprint", "outputs"} <= data.keys())


def _check_size(file: File, size: int | None, directory: str, manifest: Manifest) -> None:
    if size == file.size:
        return
    what = "missing" if size is None else f"damaged, {size} bytes instead of {file.size}"
    raise UserError(f"{directory}/{file.path}: {what}; {_remedy(manifest)}")


def _remedy(manifest: Manifest) -> str:
    directory = f"{manifest.component}/{manifest.fingerprint}"
    return f"run again with --rebuild {manifest.label}, or delete the directory {directory}"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_system(root: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(root)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{root}: {error}") from None


@contextlib.contextmanager
def _remote_errors(where: str) -> Iterator[None]:
    """Failures of an object store are the system's, a missing file is not a failure."""
    try:
        yield
    except (FileNotFoundError, UnicodeDecodeError):
        raise
    except Exception as error:
        raise SystemFault(f"{where}: {type(error).__name__}: {error}") from error


def _patiently(where: str, call: Callable[..., Any], *arguments: str) -> Any:
    """Make a call; where it fails because the object store is away, again and again for `PATIENCE_SECONDS`."""
    until = time.monotonic() + PATIENCE_SECONDS
    pause, longest = RETRY_SECONDS
    while True:
        try:
            return call(*arguments)
        except Exception as error:
            if not _passing(error) or time.monotonic() + pause > until:
                raise
            if pause == RETRY_SECONDS[0]:
                reason = " ".join(str(error).split())[:200]
                events.emit("log", step="artifacts", text=f"{where}: the store is away, will be tried again ({reason})")
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _passing(error: Exception) -> bool:
    """Whether an object store may do later what it failed to do now: it is away or busy, and does not refuse."""
    if isinstance(error, OSError):
        refusals = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
        return not isinstance(error, refusals) and error.errno not in (errno.ENOSPC, errno.EDQUOT)
    # Names that botocore and aiohttp (there where s3fs or gcsfs is) have for lost connections.
    away = {"ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError"}
    return any(kind.__name__ in away for kind in type(error).__mro__)
