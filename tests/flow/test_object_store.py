"""An object store that goes away: a real S3 server, killed while an artifact is copied."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import artifact
from ling_flow.flow.artifact import ArtifactStore
from ling_flow.flow.component import Model, Output, Resources, component
from tests.flow.seaweed import BUCKET, S3
from tests.watching import found_below

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]

FILES, FILE_BYTES = 40, 2_000_000
AWAY_SECONDS = 20
ROOT = f"s3://{BUCKET}/artifacts"


class WeightsConfig(StrictModel):
    seed: int = Field(description="Of the bytes")


class WeightsResult(StrictModel):
    made: int = Field(description="Files that this try had to make")


@component(version=1, resources=Resources(), resumable=True)
def weights(config: WeightsConfig, model: Output[Model]) -> WeightsResult:
    """Random files, those that are not there yet."""
    generator = np.random.default_rng(config.seed)
    made = 0
    for number in range(FILES):
        data = generator.bytes(FILE_BYTES)
        path = model.path / f"{number:02d}.bin"
        if not path.exists():
            path.write_bytes(data)
            made += 1
    return WeightsResult(made=made)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    made = S3(tmp_path_factory.mktemp("s3"))
    try:
        made.start()
        made.files().mkdir(BUCKET)
        yield made
    finally:
        made.kill()


@pytest.fixture
def s3(server: S3, home: Path, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The running server, and the environment that leads to it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    if server.process is None:
        server.start()
    return server


def whole(fingerprint: str, cache: Path) -> Path:
    """The artifact as a machine reads it that never saw it: each file is held to its SHA-256."""
    path, _ = ArtifactStore(ROOT, cache).open("weights", fingerprint, "model")
    assert len(list(path.iterdir())) == FILES
    return path


def kill_when(s3: S3, condition: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    """Once the condition holds the server is killed, and `then` called."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.02)
        s3.kill()
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_an_upload_outlives_twenty_seconds_without_the_server(
    s3: S3, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def some_are_there() -> bool:
        seen[:] = s3.files().find(f"{BUCKET}/artifacts/weights")
        return len(seen) >= 5

    def come_back() -> None:
        time.sleep(AWAY_SECONDS)
        s3.start()

    fault = kill_when(s3, some_are_there, come_back)
    outcome = weights(WeightsConfig(seed=1), root=ROOT)
    fault.join()
    assert len(seen) < FILES and not any(name.endswith("manifest.json") for name in seen)  # killed in the middle
    assert (outcome.cached, outcome.result.made) == (False, FILES)
    whole(outcome.fingerprint, tmp_path / "elsewhere")
    assert weights(WeightsConfig(seed=1), root=ROOT).cached
    assert capfd.readouterr().err.count("the store is away, will be tried again") >= 1


def test_a_download_outlives_it_too(s3: S3, tmp_path: Path) -> None:
    outcome = weights(WeightsConfig(seed=2), root=ROOT)
    cache = tmp_path / "elsewhere"

    def come_back() -> None:
        time.sleep(AWAY_SECONDS / 4)
        s3.start()

    fault = kill_when(s3, lambda: len(found_below(cache, "*.bin")) >= 5, come_back)
    whole(outcome.fingerprint, cache)
    fault.join()


def test_a_server_that_stays_away_costs_the_upload_and_not_the_work(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(s3.files().find(f"{BUCKET}/artifacts"))
    fault = kill_when(s3, lambda: len(s3.files().find(f"{BUCKET}/artifacts")) > before + 2, lambda: None)
    with monkeypatch.context() as impatient:
        impatient.setattr(artifact, "PATIENCE_SECONDS", 1.0)
        with pytest.raises(SystemFault, match="s3://bucket/artifacts/weights/"):
            weights(WeightsConfig(seed=3), root=ROOT)
    fault.join()
    s3.start()
    outcome = weights(WeightsConfig(seed=3), root=ROOT)
    assert (outcome.cached, outcome.result.made) == (False, 0)
    path = whole(outcome.fingerprint, tmp_path / "elsewhere")
    assert {file.path for file in outcome.manifest.files} == {f"model/{name.name}" for name in path.iterdir()}


def test_a_damaged_object_is_named_and_a_rebuild_heals_it(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = weights(WeightsConfig(seed=4), root=ROOT)
    name = f"{ROOT}/weights/{outcome.fingerprint}/model/07.bin"
    s3.files().pipe_file(name, bytes(FILE_BYTES))  # as large as before
    store = ArtifactStore(ROOT, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{name}: damaged, its SHA-256 differs .* --rebuild weights"):
        store.open("weights", outcome.fingerprint, "model")
    monkeypatch.setenv("LING_FLOW_REBUILD", '["weights"]')
    weights(WeightsConfig(seed=4), root=ROOT)
    store.open("weights", outcome.fingerprint, "model")
