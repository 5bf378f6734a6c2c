"""The Ray that a step runs its workers on: the cluster at RAY_ADDRESS, or a Ray of our own while it lasts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ling_flow.errors import SystemFault, UserError
from ling_flow.private_ray import prepare_private_ray, start_private_ray

OBJECT_STORE_BYTES = 2**27  # corpora and checkpoints travel by path; results are small


@contextmanager
def ray_running(cpus: int | None) -> Iterator[None]:
    """A connected Ray; only what is started here is shut down.

    Args:
        cpus: of a Ray started here; None: one per core. A cluster that runs already brings its own.

    Raises:
        UserError: RAY_ADDRESS is no address of a cluster.
        SystemFault: RAY_ADDRESS is set, but no cluster answers there; or a Ray of our own does not start.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        prepare_private_ray()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning for each task without GPU
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        _check_answers(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_cluster(address, error) from None
    else:
        start_private_ray(cpus or len(os.sched_getaffinity(0)), OBJECT_STORE_BYTES, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def check_gpus(wanted: float) -> None:
    """Ray waits for ever for what it will never have. A cluster of others may grow: only ours is known.

    Raises:
        UserError: a Ray of our own has fewer GPUs than one trial wants.
    """
    import ray

    there = ray.cluster_resources().get("GPU", 0.0)
    if wanted > there and not os.environ.get("RAY_ADDRESS"):
        raise UserError(f"gpus_per_trial: {wanted:g} wanted, but this machine has {there:g}; set RAY_ADDRESS, or fewer")


def check_alive() -> None:
    """To be asked often by who waits for a Ray started here: Ray takes 10 s and longer to see that it is dead, and then
    ends this process with exit code 1.

    Raises:
        SystemFault: a process without which it cannot go on is dead.
    """
    from ray._private import worker  # no public name tells

    node = worker._global_node
    dead = {kind for kind, _ in node.dead_processes()} & {"raylet", "gcs_server"} if node is not None else ()
    if dead:
        raise SystemFault(f"the local Ray is dead ({', '.join(sorted(dead))} ended); run again to go on")


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes where nobody listens.

    Raises:
        UserError: the address is a job server's.
        SystemFault: nobody listens at `address`, a `host:port` with or without `ray://`.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS: {address} is a job server, to which LING_FLOW_RUN_ON=ray-job submits; "
            "a step in this process needs HOST:PORT or ray://HOST:PORT"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> SystemFault:
    return SystemFault(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error})")
