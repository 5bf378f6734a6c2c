"""A Ray of our own, while a step or an endpoint lasts, leaves nothing behind that changes other Rays of the machine."""

from __future__ import annotations

import os
import secrets
from typing import Any

from ling_flow.errors import SystemFault


def prepare_private_ray() -> None:
    """To be called before `ray` is imported, where no RAY_ADDRESS is given.

    Ray 2.60 secures a new local cluster by a token that it writes to ~/.ray/auth_token. From then on every
    `ray start --head` of that user asks for it, and `ray job submit` does not send it by itself. Ours gets a token that
    lives in the environment only.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers niceness 15: beside anything else on the machine, trials and endpoints would hardly get on.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def start_private_ray(cpus: int, object_store_bytes: int, **options: Any) -> None:
    """`ray.init` of a cluster of our own, after `prepare_private_ray`.

    Raises:
        SystemFault: it does not start.
    """
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            **options,
        )
    except Exception as error:  # Ray has no class of its own for a node that was too slow, or died
        reason = " ".join(str(error).split())[:200]
        raise SystemFault(f"a local Ray did not start ({reason}); is the machine busy, or its memory full?") from error
