"""Before anything is spent: are the credentials for the tracking store and the artifact root good?"""

from __future__ import annotations

import contextlib
import os
import uuid

from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import mlflow_store as store
from ling_flow.flow.artifact import ArtifactStore
from ling_flow.flow.context import Context
from ling_flow.redact import redact

_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


# Stores that MLflow takes and that are first asked by what a run records.
_UNASKED = ("sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


def check_access(context: Context, write: bool) -> list[str]:
    """What is away at the moment, one line each. A tracking store may be: its record is kept until it is back.

    An artifact root that is away is not reported here: reading the first manifest says so.

    Args:
        write: also try to write to the artifact root (a small object, removed at once), as a run will.

    Raises:
        UserError: credentials are refused, there is no such tracking store or bucket; the message names the variables.
    """
    check_artifacts(ArtifactStore(context.artifacts, context.home / "cache"), write)
    away = check_tracking(context.tracking_uri)
    return [away] if away else []


def check_tracking(uri: str | None) -> str | None:
    """As `check_access`, of a tracking store alone: what is away, or None. Databases are not asked."""
    if uri is None or uri.partition(":")[0].partition("+")[0] in _UNASKED:
        return None
    try:
        with store.reaching(uri):
            store.connect(uri).search_experiments(max_results=1)
    except SystemFault:
        return redact(f"tracking store {uri} does not answer: what a run tells it is kept, and sent when it is back")
    except UserError:
        if uri.startswith(("http://", "https://")):
            raise
        raise UserError(
            f"MLFLOW_TRACKING_URI {uri}: MLflow keeps no runs there; name a database or a server "
            "(sqlite:///FILE, postgresql://…, http://HOST:PORT)"
        ) from None
    return None


def check_artifacts(artifacts: ArtifactStore, write: bool) -> None:
    """As `check_access`, of an artifact root alone."""
    if not artifacts.remote:
        return
    root, remote = artifacts.root, artifacts.remote
    try:
        _read(artifacts)
        if write:
            probe = f"{root}/.probe-{uuid.uuid4().hex}"
            remote.pipe_file(probe, b"")
            remote.rm_file(probe)
    except FileNotFoundError:
        bucket = remote._strip_protocol(root).split("/")[0]
        raise UserError(f"artifact root {root}: there is no bucket {bucket}; make it, or name another") from None
    except Exception as error:
        if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
            keys = _KEYS.get(root.partition("://")[0], "the credentials")
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise UserError(f"artifact root {root}: refused ({reason}); check {keys}") from None


def check_temporary() -> None:
    """
    Raises:
        UserError: TMPDIR, where the process of a step begins, is no directory that can be written to.
    """
    path = os.environ.get("TMPDIR")
    if path and not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        raise UserError(f"TMPDIR: {path} is no directory that can be written to; make it, or unset the variable")


def _read(artifacts: ArtifactStore) -> None:
    """List the root; one that is not there yet is as good as an empty one, if its bucket is there."""
    remote, root = artifacts.remote, artifacts.root
    try:
        remote.ls(root, refresh=True)
    except FileNotFoundError:
        with contextlib.suppress(PermissionError):  # some may read below the root only
            remote.ls(remote._strip_protocol(root).split("/")[0], refresh=True)
