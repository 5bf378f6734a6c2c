"""A stand-in for a Kubeflow Pipelines server: HTTP for real, but it runs nothing.

It answers the calls of the published API v2beta1 that we make (healthz, experiments, pipelines, uploaded versions,
runs), refuses requests whose bodies are not of the published models (kfp-server-api) or whose packages are no
pipelines, and gives runs the states that a test scripts. Whether a real server accepts the same is not shown by it.
"""

from __future__ import annotations

import email
import json
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

Answer = tuple[int, Any]


class KfpServer:
    """`url` is its address; `script` the states that a run shows, one for each time it is asked for, the last for good.

    Attributes:
        received: the text of every request, for a look at what was sent.
        token: where set, requests must bear it.
        faults: statuses to answer the next requests with instead.
    """

    def __init__(self) -> None:
        self.received: list[str] = []
        self.token: str | None = None
        self.faults: list[int] = []
        self.script: list[str] = ["SUCCEEDED"]
        self.tasks: list[dict[str, Any]] = []
        self.error = ""
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.packages: list[str] = []
        self._asked: dict[str, int] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.received.append(f"{self.command} {self.path}\n{self.headers}\n{body.decode(errors='replace')}")
                status, content = server.answer(self.command, self.path, dict(self.headers), body)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """One request."""
        if self.faults:
            return self.faults.pop(0), {"message": "scripted fault"}
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"message": "Request header error: there is no user identity header."}
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        calls: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", r"healthz", lambda: (200, {"multi_user": False})),
            ("GET", r"experiments", lambda: self._list("experiments", self.experiments, query)),
            ("POST", r"experiments", lambda: self._make("experiment", self.experiments, "V2beta1Experiment", body)),
            ("GET", r"pipelines", lambda: self._list("pipelines", self.pipelines, query)),
            ("POST", r"pipelines", lambda: self._make("pipeline", self.pipelines, "V2beta1Pipeline", body)),
            ("POST", r"pipelines/upload_version", lambda: self._upload(query, headers, body)),
            (
                "GET",
                r"pipelines/([\w-]+)/versions",
                lambda of: self._list("pipeline_versions", self.versions, query, of),
            ),
            ("POST", r"runs", lambda: self._start(body)),
            ("GET", r"runs", lambda: self._list("runs", self.runs, query)),
            ("GET", r"runs/([\w-]+)", self._show),
        ]
        for verb, pattern, call in calls:
            found = re.fullmatch(f"/apis/v2beta1/{pattern}", parts.path)
            if found and verb == method:
                return call(*found.groups())
        return 404, {"message": f"{method} {parts.path}: not one of the calls that this stand-in knows"}

    def _list(self, name: str, items: dict[str, Any], query: dict[str, str], of: str | None = None) -> Answer:
        found = [item for item in items.values() if of is None or item["pipeline_id"] == of]
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", ()):
            _as_model(predicate, "V2beta1Predicate", {"stringValue": "string_value"})
            found = [item for item in found if item[predicate["key"]] == predicate["stringValue"]]
        if "experiment_id" in query:
            found = [item for item in found if item["experiment_id"] == query["experiment_id"]]
        if query.get("sort_by") == "created_at desc":
            found.reverse()
        start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
        page = {name: found[start : start + size], "total_size": len(found)}
        return 200, page | ({"next_page_token": str(start + size)} if start + size < len(found) else {})

    def _make(self, kind: str, items: dict[str, Any], model: str, body: bytes) -> Answer:
        content = json.loads(body)
        problem = _as_model(content, model)
        if problem or not content.get("display_name"):
            return 400, {"message": problem or "display_name is missing"}
        if any(item["display_name"] == content["display_name"] for item in items.values()):
            return 409, {"message": f"Already exist error: {content['display_name']}"}
        made = {**content, f"{kind}_id": f"{kind}-{len(items) + 1}", "created_at": _now()}
        items[made[f"{kind}_id"]] = made
        return 200, made

    def _upload(self, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        if query.get("pipelineid") not in self.pipelines:
            return 404, {"message": f"pipeline {query.get('pipelineid')} not found"}
        message = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
        (part,) = message.get_payload()  # type: ignore[misc]
        if part.get_param("name", header="Content-Disposition") != "uploadfile":  # type: ignore[union-attr]
            return 400, {"message": "no field uploadfile"}
        text = part.get_payload(decode=True).decode()  # type: ignore[union-attr]
        try:
            check_package(text)
        except (json_format.ParseError, ValueError, KeyError) as error:
            return 400, {"message": f"not a pipeline: {error}"}
        key = f"version-{len(self.versions) + 1}"
        made = {
            "pipeline_id": query["pipelineid"], "pipeline_version_id": key, "display_name": query["name"],
            "created_at": _now(),
        }  # fmt: skip
        self.versions[key] = made
        self.packages.append(text)
        return 200, made

    def _start(self, body: bytes) -> Answer:
        content = json.loads(body)
        problem = _as_model(content, "V2beta1Run")
        reference = content.get("pipeline_version_reference", {})
        if problem:
            return 400, {"message": problem}
        if (
            reference.get("pipeline_version_id") not in self.versions
            or content["experiment_id"] not in self.experiments
        ):
            return 404, {"message": "no such version or experiment"}
        key = f"run-{len(self.runs) + 1}"
        self.runs[key] = {**content, "run_id": key, "state": "PENDING", "created_at": _now()}
        return 200, self.runs[key]

    def _show(self, key: str) -> Answer:
        if key not in self.runs:
            return 404, {"message": f"run {key} not found"}
        asked = self._asked.get(key, 0)
        self._asked[key] = asked + 1
        run = self.runs[key]
        run["state"] = self.script[min(asked, len(self.script) - 1)]
        if self.tasks:
            run["run_details"] = {"task_details": self.tasks[: asked + 1]}
        if run["state"] == "FAILED":
            run["error"] = {"code": 13, "message": self.error}
        return 200, run


def check_package(text: str) -> list[Any]:
    """The documents of a compiled pipeline.

    Raises:
        ParseError, ValueError: the documents are no PipelineSpec and, where there are two, PlatformSpec.
    """
    documents = list(yaml.load_all(text, yaml.CSafeLoader))
    if len(documents) not in (1, 2):
        raise ValueError(f"{len(documents)} documents")
    spec = pipeline_spec_pb2.PipelineSpec()
    json_format.ParseDict(documents[0], spec)
    if len(documents) == 2:
        platform = pipeline_spec_pb2.PlatformSpec()
        json_format.ParseDict(documents[1], platform)
        executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for name, config in executors.items():
            if name not in documents[0]["deploymentSpec"]["executors"]:
                raise ValueError(f"platform of an unknown executor {name}")
            json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    return documents


def _as_model(content: dict[str, Any], name: str, renamed: dict[str, str] | None = None) -> str:
    """What is wrong with a body that should be the model `name`, "" where nothing is."""
    model = getattr(kfp_server_api, name)
    known = {**model.attribute_map, **{new: old for new, old in (renamed or {}).items()}}
    unknown = [key for key in content if key not in known.values() and key not in (renamed or {})]
    if unknown:
        return f"unknown field {unknown[0]} in {name}"
    for attribute, kind in model.openapi_types.items():
        value = content.get(model.attribute_map[attribute])
        if value is None:
            continue
        if kind == "str" and not isinstance(value, str):
            return f"{attribute} of {name} is not text"
        if hasattr(kfp_server_api, kind) and isinstance(value, dict) and (problem := _as_model(value, kind)):
            return problem
    return ""


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
