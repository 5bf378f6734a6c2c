"""Steps of a local run in containers: what `kfp.local.DockerRunner` needs for each, and what stops them.

Any engine with the Docker API will do (Docker, podman); DOCKER_HOST says where it listens. A step sees the home
directory at its own path, the network of this machine, and those environment variables that concern it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling_flow.errors import SystemFault, UserError
from ling_flow.flow.context import Context
from ling_flow.flow.kfp_face import DEFAULT_IMAGE

RUN_LABEL = "ling_flow.run"
HOME_LABEL = "ling_flow.home"
VERSION_LABEL = "org.opencontainers.image.version"
SHARED_MEMORY = "2g"  # Ray keeps its objects there; an engine gives 64 MiB by itself
STOP_SECONDS = 60  # for a step that is told to stop: training saves a checkpoint first
_PASSED = re.compile(r"(LING_FLOW|MLFLOW|AWS|RAY|OMP|OPENBLAS|TRITON)_\w+")
_OF_THE_IMAGE = ("LING_FLOW_CODE_VERSION",)


@dataclass(frozen=True)
class User:
    """Whom steps run as: numbers, and whether the image knows that user (who else has no home directory there)."""

    uid: int
    gid: int
    of_image: bool


class Engine:
    """A container engine that answers."""

    def __init__(self, client: Any) -> None:
        self.client = client

    @staticmethod
    def connect() -> Engine:
        """The engine at DOCKER_HOST, default Docker's socket.

        Raises:
            SystemFault: none answers there.
        """
        import docker

        address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        try:
            client = docker.from_env()
            client.ping()
        except (docker.errors.DockerException, OSError) as error:
            raise SystemFault(
                f"DOCKER_HOST: no container engine answers at {address} ({_cause(error)}); start Docker, or podman by "
                "'podman system service --time 0 unix:///path/podman.sock' and set DOCKER_HOST to that address"
            ) from None
        return Engine(client)

    def name_of(self, image: str) -> str:
        """The name that the engine knows `image` by: podman puts localhost/ before those that were built here.

        Raises:
            UserError: there is no such image, here or at the registry that its name holds.
        """
        import docker

        tagged = image if ":" in image.rpartition("/")[2] or "@" in image else f"{image}:latest"
        for name in (tagged, f"localhost/{tagged}", f"docker.io/library/{tagged}"):
            with contextlib.suppress(docker.errors.ImageNotFound):
                found = self.client.images.get(name)
                if name in (*found.tags, *found.attrs.get("RepoDigests", ())):
                    return name
        registry = image.partition("/")[0]
        reason = "it is not here"
        if "." in registry or (":" in registry and "/" in image):
            try:
                self.client.images.pull(tagged)
                return tagged
            except docker.errors.APIError as error:
                reason = f"it is not here and cannot be pulled ({_cause(error)})"
        raise UserError(
            f"image {image}: {reason}; build it (infra/images/build) or set LING_FLOW_IMAGE to one that is there"
        )

    def user_of(self, image: str) -> User:
        """Whom the steps of `image` run as: the one who called us, or where that is root, the image's own user.

        An engine that runs without root takes its root for the one who started it.

        Raises:
            UserError: we are root, and the image names its user by a word.
        """
        if any("rootless" in option for option in self.client.info().get("SecurityOptions") or ()):
            return User(0, 0, of_image=True)
        if os.getuid() != 0:
            return User(os.getuid(), os.getgid(), of_image=False)
        given = str(self.client.images.get(image).attrs["Config"].get("User") or "0")
        uid, _, gid = given.partition(":")
        if not uid.isdigit() or not (gid or uid).isdigit():
            raise UserError(f"image {image}: its user is '{given}'; name it by number (USER 1000:1000)")
        return User(int(uid), int(gid or uid), of_image=True)

    def code_version_of(self, image: str) -> str:
        """What the image was built from, "" where it does not say."""
        labels = self.client.images.get(image).labels or {}
        return str(labels.get(VERSION_LABEL, ""))

    def remove_ended(self, home: Path) -> None:
        """Remove what ended steps of killed runs left: their runner was not there to do it."""
        import docker

        filters = {"label": f"{HOME_LABEL}={home}", "status": "exited"}
        for container in self.client.containers.list(all=True, filters=filters, sparse=True):
            with contextlib.suppress(docker.errors.APIError):  # another run was faster
                container.remove()


@contextlib.contextmanager
def kfp_loses_no_exit_code() -> Iterator[None]:
    """While it lasts, `kfp.local.DockerRunner` starts its containers by `_run_container`.

    KFP's own function has the engine remove each container at its end, and then asks for the exit code: when the engine
    is faster, a failed step counts as done (Docker) or a finished one as failed (podman). It does not stop a container
    when it is interrupted, and fails on half a character at the end of a piece of output.
    """
    from kfp.local import docker_task_handler

    before = docker_task_handler.run_docker_container
    docker_task_handler.run_docker_container = _run_container
    try:
        yield
    finally:
        docker_task_handler.run_docker_container = before


def _run_container(client: Any, image: str, command: list[str], volumes: Any, **arguments: Any) -> int:
    """Run a container to its end, print its output, return its exit code; where this is interrupted, it is stopped."""
    container = client.containers.create(image, command=command, volumes=volumes, **arguments)
    try:
        container.start()
        for piece in container.logs(stream=True, follow=True):
            print(piece.decode(errors="replace"), end="")
        code = int(container.wait()["StatusCode"])
        container.reload()
        if container.attrs["State"].get("OOMKilled"):
            print("the kernel ended this step: it needed more memory than there is")
        return code
    except BaseException:
        container.stop(timeout=STOP_SECONDS)
        raise
    finally:
        container.remove(force=True)


def select_image(engine: Engine) -> None:
    """Make LING_FLOW_IMAGE, which a DAG's steps take as their image when it is loaded, a name that `engine` knows."""
    os.environ["LING_FLOW_IMAGE"] = engine.name_of(os.environ.get("LING_FLOW_IMAGE") or DEFAULT_IMAGE)


def images_of(spec: Mapping[str, Any]) -> set[str]:
    """The images that the steps of a DAG run in."""
    executors = spec["deploymentSpec"]["executors"].values()
    return {executor["container"]["image"] for executor in executors if "container" in executor}


def runner_arguments(user: User, context: Context, run: str, extra: Sequence[Path]) -> dict[str, Any]:
    """Arguments of `kfp.local.DockerRunner`.

    Args:
        run: name of the run, as label of its containers.
        extra: files and directories that steps may read besides, at their own paths.
    """
    from docker.types import Mount

    folders = local_folders(context)
    environment = {
        name: value for name, value in os.environ.items() if _PASSED.fullmatch(name) and name not in _OF_THE_IMAGE
    }
    if not user.of_image:
        environment["HOME"] = "/tmp"
    named = {Path(value) for value in environment.values() if value.startswith("/") and Path(value).is_file()}
    readable = {
        path.absolute() for path in (*extra, *named) if not any(path.is_relative_to(folder) for folder in folders)
    }
    return {
        "environment": environment,
        "mounts": [
            *(Mount(str(folder), str(folder), type="bind") for folder in folders),
            *(Mount(str(path), str(path), type="bind", read_only=True) for path in sorted(readable)),
        ],
        "user": f"{user.uid}:{user.gid}",
        "network_mode": "host",
        "shm_size": SHARED_MEMORY,
        "labels": {RUN_LABEL: run, HOME_LABEL: str(context.home)},
    }


def local_folders(context: Context) -> list[Path]:
    """The directories of this machine that a run writes to: the home, and the artifacts where they lie elsewhere."""
    folders = [context.home]
    if "://" not in context.artifacts and not Path(context.artifacts).absolute().is_relative_to(context.home):
        folders.append(Path(context.artifacts).absolute())
    return folders


def check_tracking(context: Context, tracking_uri: str) -> None:
    """
    Raises:
        UserError: the tracking database is a file that containers do not see.
    """
    if tracking_uri.startswith("sqlite:///"):
        path = Path(tracking_uri.removeprefix("sqlite:///")).absolute()
        if not path.is_relative_to(context.home):
            raise UserError(
                f"MLFLOW_TRACKING_URI: {path} lies outside {context.home}, so containers do not see it; "
                "unset it, or name a server (http://…)"
            )


def hand_over(context: Context, run_directory: Path, user: User) -> None:
    """Give what root made in the run's directories to `user`, so that steps can go on with it. Only for root."""
    if os.getuid() != 0 or user.uid == 0:
        return
    given = [context.home, *(path for path in context.home.iterdir() if path.is_file())]
    tops = [run_directory, *(context.home / name for name in ("cache", "endpoints", "mlartifacts"))]
    if "://" not in context.artifacts:
        Path(context.artifacts).mkdir(parents=True, exist_ok=True)
        tops.append(Path(context.artifacts))
    for top in tops:
        for directory, _, files in os.walk(top):
            given += [Path(directory), *(Path(directory) / name for name in files)]
    for path in given:
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_uid == 0:
                os.chown(path, user.uid, user.gid, follow_symlinks=False)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    text = getattr(error, "explanation", None) or str(error)
    return " ".join(str(text).split())[-160:]
