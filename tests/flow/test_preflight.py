"""What is refused before anything is spent. Real servers with wrong credentials: test_stack.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ling_flow.errors import UserError
from ling_flow.flow.context import Context
from ling_flow.flow.preflight import check_access, check_temporary
from tests.conftest import Called


def check(home: Path, uri: str | None) -> list[str]:
    return check_access(Context(home=home, artifacts=str(home / "artifacts"), tracking_uri=uri), write=True)


@pytest.fixture
def by_another_name() -> Iterator[str]:
    """URL of a server that answers as MLflow's does to a name that is not among its hosts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = b"Invalid Host header - possible DNS rebinding attack detected"
            self.send_response(403)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("uri", ["file:///tmp/runs", "./runs", "sqlit:///runs.db"])
def test_a_store_that_mlflow_does_not_take_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI .*: MLflow keeps no runs there; .* \(sqlite:///FILE, "):
        check(home, uri)
    assert not (tmp_path / "runs").exists()


def test_a_database_is_not_made_by_looking(home: Path) -> None:
    for uri in (None, f"sqlite:///{home}/mlflow.db", "postgresql+psycopg2://nowhere/mlflow"):
        assert check(home, uri) == []
    assert not home.exists()


def test_a_name_that_the_server_does_not_go_by_is_no_missing_permission(home: Path, by_another_name: str) -> None:
    with pytest.raises(UserError, match="takes no requests under that name; use one of its MLFLOW_SERVER_ALLOWED_HOST"):
        check(home, by_another_name)


def test_a_run_does_not_begin(call: Callable[..., Called], tmp_path: Path) -> None:
    done = call("run", MLFLOW_TRACKING_URI=f"file://{tmp_path}/runs")
    assert done.code == 2
    assert done.err.strip().endswith("(sqlite:///FILE, postgresql://…, http://HOST:PORT)")


def test_a_temporary_directory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    check_temporary()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"TMPDIR: .*none is no directory"):
        check_temporary()
