"""Where a model is served: an endpoint of this machine, or a RayService of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ling_flow.flow.component import Step
from ling_flow.flow.context import Context
from ling_flow.flow.promotion import Version


@dataclass(frozen=True)
class Served:
    """A model that answers at `url` (without /v1); `take_back` undoes that."""

    url: str
    record: dict[str, Any]
    take_back: Callable[[], object]


def serve_here(champion: Version, context: Context, home: Path, port: int | None, host: str, step: Step) -> Served:
    """By a background process, in place of what its endpoint served before; `home` keeps its records.

    Raises:
        UserError: the port is taken.
        SystemFault: it did not come up, and the old one is put back.
    """
    from ling_flow.flow.lineage import resolve_model
    from ling_flow.serving.server import start_detached, take_back

    model = resolve_model(champion.uri, context)
    step.log(f"starting an endpoint for {champion.uri}")
    started = start_detached(model.path, champion.name, champion.fingerprint, home, port, host, champion.number)
    return Served(started.endpoint.url, started.endpoint.model_dump(), lambda: take_back(started, home))


def serve_by_rayservice(champion: Version, name: str, context: Context, step: Step) -> Served:
    """By the RayService `name`, without a gap; what it served before answers until the new model does.

    Raises:
        UserError: there is no such RayService.
        SystemFault: the new model did not come up, and the old one is put back.
    """
    from ling_flow.config import parse
    from ling_flow.flow.job_settings import JobSettings
    from ling_flow.flow.kube_api import Kubernetes, own_namespace
    from ling_flow.flow.rayservice import restore, service_url, switch
    from ling_flow.serving.server import served_fingerprint

    cluster = parse(JobSettings, context.job, "LING_FLOW_JOB").cluster
    namespace = cluster.namespace or own_namespace()
    url = service_url(namespace, name)
    api = Kubernetes()
    step.log(f"RayService {namespace}/{name} is to serve {champion.uri}")
    before = switch(
        api, namespace, name, champion.uri, lambda: served_fingerprint(url) == champion.fingerprint,
        cluster.pending_deadline_s,
    )  # fmt: skip
    record = {"name": champion.name, "url": url, "fingerprint": champion.fingerprint, "version": champion.number}
    return Served(url, {**record, "rayservice": f"{namespace}/{name}"}, lambda: restore(api, namespace, before))
