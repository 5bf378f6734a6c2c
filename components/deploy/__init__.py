"""Deploy: the champion behind an OpenAI-compatible HTTP endpoint, proven by one real request."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from components.register import Registration
from ling_flow.config import StrictModel, context_field, parse
from ling_flow.data.reasoning import TaskSpec
from ling_flow.errors import LingFlowError, SystemFault, UserError
from ling_flow.flow.component import Input, Metrics, Output, Resources, Step, component
from ling_flow.ports import direct


class DeployConfig(StrictModel):
    """Where the endpoint listens, and how it is proven."""

    task: TaskSpec = Field(TaskSpec(name="chain_sum"), description="family that the held-out question is drawn from")
    max_tokens: int = Field(64, ge=1, description="longest answer to that question, tokens")
    seed: int = Field(0, ge=0, lt=2**32, description="seed that draws the question")
    port: int | None = context_field(
        None,
        why="the same model answers the same on any port",
        description="TCP port; null takes the old endpoint's, or the first free one from 8000",
        ge=1,
        le=65535,
    )
    rayservice: str | None = context_field(
        None,
        why="who serves a model changes no answer",
        description="name of the RayService of the cluster that is to serve it; null: an endpoint of this machine",
    )
    host: str = context_field(
        "127.0.0.1",
        why="the same model answers the same on any address",
        description="address to listen on; anything but 127.0.0.1 lets other machines in, without a password",
    )


class DeployResult(StrictModel):
    """The endpoint, and its answer to the held-out question."""

    url: str = Field(description="base URL of the endpoint, without /v1")
    completion: str = Field(description="what it answered, greedily")
    correct: bool = Field(description="whether that was right")
    model_name: str = Field(description="name of the served model")
    model_version: int = Field(description="registered version that is served")
    fingerprint: str = Field(description="fingerprint of the artifact that is served")
    seconds_to_ready: float = Field(description="from the start of the endpoint to its first sign of health, seconds")
    latency_ms: float = Field(description="of the answer, milliseconds")


class Deployment(StrictModel):
    """What `deployment.json` holds."""

    endpoint: dict[str, Any] = Field(description="the endpoint's record")
    model_uri: str = Field(description="models:/<name>/<version>")
    question: str = Field(description="the held-out question")
    expected: str = Field(description="its right answer")
    answer: dict[str, Any] = Field(description="the endpoint's whole answer, an OpenAI chat.completion")


def _still_deployed(config: DeployConfig, result: DeployResult, root: Path) -> bool:
    """What it served is still the champion, and is served where `config` says; in containers, that it once was."""
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry
    from ling_flow.serving.server import endpoint_status, served_fingerprint

    context = Context.from_environment()
    champion = Registry.of(context).by_alias(result.model_name, "champion")
    if champion is None or champion.number != result.model_version:
        return False
    place = urlsplit(result.url)
    by_service = (place.hostname or "").endswith(".svc")
    if by_service != (config.rayservice is not None):
        return False
    if by_service:
        same = (place.hostname or "").startswith(f"{config.rayservice}-serve-svc.")
        return same and served_fingerprint(result.url) == result.fingerprint
    if _ends_with_step():
        return True
    if place.hostname != config.host or config.port not in (None, place.port):
        return False
    status = endpoint_status(result.model_name, context.home)
    if status is None or not status.healthy:
        return False
    return (status.endpoint.url, status.endpoint.fingerprint) == (result.url, result.fingerprint)


@component(version=2, resources=Resources(cpus=2, memory_gib=4), still_valid=_still_deployed)
def deploy(config: DeployConfig, registration: Input[Metrics], deployment: Output[Metrics], step: Step) -> DeployResult:
    """Serve the registry's champion, in place of what its endpoint served before, and ask it a held-out question."""
    from components.deploy.places import serve_by_rayservice, serve_here
    from ling_flow.data.reasoning import problems, score
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry

    where = f"{registration.ref}/registration.json"
    record = parse(Registration, registration.read_json("registration.json"), where)
    context = Context.from_environment()
    champion = Registry.of(context).by_alias(record.model_name, "champion")
    if champion is None:
        reasons = "; ".join(verdict.sentence for verdict in record.verdicts if not verdict.passed)
        raise UserError(f"{record.model_name}: nothing to deploy, no version is champion: gate failed ({reasons})")
    if champion.number != record.version:
        step.log(f"version {record.version} is not the champion; version {champion.number} is deployed")
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(problems, [config.task], 1, config.seed, "held_out")  # takes seconds, for its imports
        if config.rayservice:
            served = serve_by_rayservice(champion, config.rayservice, context, step)
        else:
            # Records in the home, and the ports from 8000, are for what stays.
            home, port = context.home, config.port
            if _ends_with_step():
                home, port = Path(tempfile.mkdtemp()), port or _any_port(config.host)
            served = serve_here(champion, context, home, port, config.host, step)
        (problem,) = drawing.result()
    ready = time.monotonic()
    try:
        answer = _ask(served.url, problem.question, config.max_tokens)
    except LingFlowError:
        served.take_back()
        raise
    latency = time.monotonic() - ready
    completion = answer["choices"][0]["message"]["content"]
    step.log(f"{served.url}/v1 answers {problem.question!r}: {completion!r}")
    if _ends_with_step() and not config.rayservice:
        served.take_back()
        step.log(f"proven; this endpoint ends with its container. To go on serving: lingflow serve {champion.uri}")

    written = Deployment(
        endpoint=served.record,
        model_uri=champion.uri,
        question=problem.question,
        expected=problem.answer,
        answer=answer,
    )
    (deployment.path / "deployment.json").write_text(written.model_dump_json(indent=2) + "\n")
    return DeployResult(
        url=served.url,
        completion=completion,
        correct=score(problem, completion) == 1.0,
        model_name=champion.name,
        model_version=champion.number,
        fingerprint=champion.fingerprint,
        seconds_to_ready=round(ready - started, 3),
        latency_ms=round(latency * 1000, 3),
    )


def _ends_with_step() -> bool:
    """Whether what a step starts ends with it: `lingflow run --runner docker` gives each a container of its own."""
    return os.environ.get("LING_FLOW_RUNNER") == "docker"


def _any_port(host: str) -> int:
    """A free port of the kernel's choice."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _ask(url: str, question: str, max_tokens: int) -> dict[str, Any]:
    """One request over HTTP, as any client would make it."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": max_tokens}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with direct.open(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")
        kind = UserError if 400 <= error.code < 500 else SystemFault  # more tokens than the model's context holds
        raise kind(f"{url}: refused the request that should prove it: {error.code} {reason}") from error
    except (OSError, ValueError) as error:
        raise SystemFault(f"{url}: did not answer the request that should prove it ({error})") from error
    return answer
