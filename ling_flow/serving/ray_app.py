"""The chat application on Ray Serve. Ray is imported inside the functions only."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ling_flow.private_ray import prepare_private_ray, start_private_ray

OBJECT_STORE_BYTES = 100 * 2**20  # requests and answers are small; 75 MiB is Ray's minimum


def application(find: Callable[[], tuple[Path, str, str]]) -> Any:
    """The Ray Serve application: replicas that hold one model.

    Args:
        find: gives, on the replica's machine, the checkpoint directory, the model's name and its fingerprint.
    """
    from ray import serve

    def build() -> Any:
        from ling_flow.serving.app import build_app
        from ling_flow.serving.chat import ChatModel

        model_dir, model_name, fingerprint = find()
        return build_app(ChatModel.load(model_dir), model_name, fingerprint)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="chat",
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=16,
        max_constructor_retry_count=1,  # a checkpoint that cannot be read will not be readable the next time
        graceful_shutdown_wait_loop_s=0.1,
    )
    return deployment.bind()


def run_until_signal(
    model_dir: Path, model_name: str, fingerprint: str, host: str, port: int, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGINT or SIGTERM, on the cluster of RAY_ADDRESS or on a small one of our own that ends with us.

    Raises:
        RuntimeError: the application did not come up; the message holds the replica's error.
        SystemFault: Ray of our own did not start.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is not None and address.startswith(("http://", "https://")):
        del os.environ["RAY_ADDRESS"]  # a job server's, where other steps run
        address = None
    if not address:
        prepare_private_ray()
        # In spite of its name, on every system: Ray's own ports, which know no password, stay off the network.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray import serve

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "ling_flow"}
    temporary = None
    stop = threading.Event()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # while Ray starts
        if address:
            ray.init(address=address, **quiet)
        else:
            # A directory of its own keeps this cluster apart from any other here. Ray picks free ports by itself.
            temporary = tempfile.mkdtemp(prefix="lf-")
            start_private_ray(1, OBJECT_STORE_BYTES, _temp_dir=temporary, **quiet)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        logging = {"log_level": "ERROR"}
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=logging)
        try:
            serve.run(
                application(lambda: (model_dir, model_name, fingerprint)), name=model_name, logging_config=logging
            )
        except RuntimeError as error:
            raise RuntimeError(_reason(model_name) or str(error)) from None
        on_ready()
        stop.wait()
        serve.delete(model_name)
    finally:
        ray.shutdown()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _reason(name: str) -> str:
    """Why the application did not come up: the last line of the replica's own error, "" where Ray knows none."""
    from ray import serve

    status = serve.status().applications.get(name)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    lines = [line.strip() for line in "\n".join(messages).splitlines() if line.strip()]
    return lines[-1].removeprefix("ling_flow.errors.UserError: ") if lines else ""
