"""A stand-in for the API server of Kubernetes, not Kubernetes.

Custom objects are kept in a dict and can be got, created, replaced and deleted, with the status codes of the real one.
No operator runs; `set_status` says what KubeRay would write.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

TOKEN = "token-of-a-service-account"


class KubernetesStandIn:
    """Serves on a free port of the loopback; `objects` by path, `requests` as (method, path)."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.on_create: Callable[[dict[str, Any]], None] = lambda manifest: None
        self.on_replace: Callable[[dict[str, Any]], None] = lambda manifest: None
        self.refuse: tuple[int, str] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path) -> Path:
        """Writes the file that leads a client here."""
        host, port = self._server.server_address[:2]
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": f"http://{host!s}:{port}"}}],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    @staticmethod
    def path(name: str, namespace: str = "default", plural: str = "rayjobs", group: str = "ray.io/v1") -> str:
        return f"/apis/{group}/namespaces/{namespace}/{plural}/{name}"

    def put(self, manifest: dict[str, Any], path: str | None = None) -> None:
        """Add an object without a request."""
        self.objects[path or self.path(manifest["metadata"]["name"])] = manifest

    def set_status(self, name: str, **status: str) -> None:
        self.objects[self.path(name)]["status"] = status

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        self.requests.append((method, path))
        if self.refuse is not None:
            return self.refuse[0], {"kind": "Status", "message": self.refuse[1]}
        if method == "POST":
            assert body is not None
            where = f"{path}/{body['metadata']['name']}"
            if where in self.objects:
                return 409, {"kind": "Status", "reason": "AlreadyExists"}
            self.objects[where] = body
            self.on_create(body)
            return 201, body
        if path not in self.objects:
            return 404, {"kind": "Status", "reason": "NotFound"}
        if method == "DELETE":
            return 200, self.objects.pop(path)
        if method == "PUT":
            assert body is not None
            version = self.objects[path]["metadata"].get("resourceVersion", "0")
            if body["metadata"].get("resourceVersion", "0") != version:
                return 409, {"kind": "Status", "reason": "Conflict"}
            body["metadata"]["resourceVersion"] = str(int(version) + 1)
            self.objects[path] = body
            self.on_replace(body)
        return 200, self.objects[path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    code, answer = 401, {"kind": "Status", "reason": "Unauthorized"}
                else:
                    code, answer = outer._answer(self.command, self.path.partition("?")[0], body)
                content = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler
