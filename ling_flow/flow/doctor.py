"""`lingflow doctor`: can this machine run the lifecycle? Each check says what it found and, if it fails, what helps."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ling_flow.errors import UserError
from ling_flow.redact import redact

Status = Literal["ok", "warning", "failed"]

PACKAGES = (
    "torch",
    "kfp",
    "ray",
    "mlflow",
    "pydantic",
    "tokenizers",
    "safetensors",
    "reasoning-gym",
    "scipy",
    "matplotlib",
)


@dataclass(frozen=True)
class Check:
    """One finding. `advice` is empty where there is nothing to do."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", redact(self.found))


def install(extra: str) -> str:
    """What brings the packages of an extra; the package is not published."""
    return f"pip install -c constraints.txt -e '.[{extra}]' in a checkout"


def examine(home: Path, tracking_uri: str) -> list[Check]:
    """Run every check; none of them changes anything but creating (and removing) a probe file in `home`."""
    checks: list[Callable[[], Check]] = [
        _python,
        _packages,
        _pipelines,
        _processors,
        _memory,
        lambda: _home(home),
        lambda: _disk(home),
        lambda: _tracking(tracking_uri),
        _ray_address,
        _containers,
        _accelerator,
    ]
    return [check() for check in checks]


def as_dicts(checks: list[Check]) -> list[dict[str, str]]:
    """The checks as plain data, for `--json`."""
    return [asdict(check) for check in checks]


def _python() -> Check:
    return Check("python", "ok", ".".join(map(str, sys.version_info[:3])))


def _packages() -> Check:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "failed", f"missing: {', '.join(missing)}", f"{install('cpu')}, or make setup")
    return Check("packages", "ok", ", ".join(found))


def _pipelines() -> Check:
    """Images hold kfp without its dependencies: enough to be a step, not to run or submit a pipeline."""
    try:
        required = importlib.metadata.requires("kfp") or []
    except importlib.metadata.PackageNotFoundError:
        return Check("pipelines", "warning", "no kfp: components run by themselves", install("cpu"))
    from packaging.requirements import Requirement

    missing = []
    for requirement in map(Requirement, required):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(requirement.name)
    if missing:
        return Check("pipelines", "ok", f"as a step only; to run pipelines kfp lacks {', '.join(missing)}")
    return Check("pipelines", "ok", "can be run, compiled and submitted")


def _processors() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if count < 2:
        return Check("processors", "warning", str(count), "preset tiny is sized for two; expect twice the time")
    return Check("processors", "ok", str(count))


def _memory() -> Check:
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return Check("memory", "warning", "unknown on this system", "preset tiny needs about 4 GiB")
    if available < 4:
        return Check("memory", "warning", f"{available:.1f} GiB free", "preset tiny needs about 4 GiB")
    return Check("memory", "ok", f"{available:.1f} GiB free")


def _home(home: Path) -> Check:
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return Check(
            "home", "failed", f"{home}: {error.strerror}", "set LING_FLOW_HOME to a directory you can write to"
        )
    return Check("home", "ok", str(home))


def _disk(home: Path) -> Check:
    place = home if home.exists() else Path.cwd()
    free = shutil.disk_usage(place).free / 2**30
    if free < 2:
        return Check("disk", "warning", f"{free:.1f} GiB free", "preset tiny writes about 0.5 GiB")
    return Check("disk", "ok", f"{free:.1f} GiB free")


def _tracking(uri: str) -> Check:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        from ling_flow.flow.preflight import check_tracking

        try:
            check_tracking(uri)
        except UserError as error:
            return Check("tracking", "failed", str(error), "unset MLFLOW_TRACKING_URI for SQLite in the home")
        return Check("tracking", "ok", uri)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=2):
            return Check("tracking", "ok", uri)
    except (OSError, ValueError) as error:  # no port can be read
        return Check("tracking", "failed", f"{uri}: {error}", "start the MLflow server or unset MLFLOW_TRACKING_URI")


def _ray_address() -> Check:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        return Check("ray", "ok", "a local Ray is started when a step needs one")
    return Check("ray", "ok", f"RAY_ADDRESS={address}")


def _containers() -> Check:
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    advice = "needed for --runner docker only: start Docker, or podman's service, and set DOCKER_HOST to its address"
    if address.startswith("unix://") and not Path(address.removeprefix("unix://")).is_socket():
        return Check("containers", "ok", f"no engine at {address}; {advice}")
    from ling_flow.errors import LingFlowError
    from ling_flow.flow.containers import Engine

    try:
        engine = Engine.connect()
    except LingFlowError as error:
        return Check("containers", "warning", str(error), advice)
    version = engine.client.version()
    name = (version.get("Components") or [{}])[0].get("Name") or "engine"
    return Check("containers", "ok", f"{name} {version.get('Version')} at {address}")


def _accelerator() -> Check:
    try:
        import torch
    except ImportError:
        return Check("accelerator", "failed", "torch cannot be imported", "make setup")
    if torch.cuda.is_available():
        return Check("accelerator", "ok", torch.cuda.get_device_name(0))
    return Check("accelerator", "ok", f"none; torch {torch.__version__} on the CPU")
