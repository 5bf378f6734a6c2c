"""What a model owner sees: MLflow's own pages on the stack, in a real browser.

LING_FLOW_SCREENSHOTS names the directory for screenshots, default `.lingflow/screenshots`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ling_flow.evaluation.gate import Gate
from ling_flow.flow import mlflow_store, tracking
from ling_flow.flow.context import Context
from ling_flow.flow.promotion import Registry
from ling_flow.flow.stack import Stack
from tests.own_stack import own_stack

pytestmark = [pytest.mark.e2e]

WAIT_SECONDS = 60
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1500,950"
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The running stack of LING_FLOW_TEST_HOME (CI has one), or one of our own."""
    given = Stack(Path(os.environ.get("LING_FLOW_TEST_HOME", "/nonexistent")) / "stack")
    servers = given.status()
    if servers and all(server.state == "healthy" for server in servers):
        yield given
        return
    with own_stack() as made:
        yield made


@pytest.fixture(scope="module")
def story(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A DAG run with two steps, and a model with a champion and the one before; ids by name."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.environment().items():
            patch.setenv(name, value)
        patch.setenv("LING_FLOW_HOME", str(home))
        uri = os.environ["MLFLOW_TRACKING_URI"]
        parent = tracking.start_dag_run(uri, "browsed", "tiny", {}, "0.1+abc")
        assert parent is not None
        patch.setenv("LING_FLOW_PARENT_RUN_ID", parent)
        ids = {"uri": uri, "parent": parent}
        for label in ("pretrain_short", "pretrain_mid"):
            tracker = tracking.open_tracker(Context.from_environment())
            tracker.start_step(label, "pretrain", label, {"tokens": 5}, {})
            for step in range(20):
                tracker.metrics({"loss": 3.0 / (step + 1)}, step)
            tracker.model(label, f"s3://ling-flow/artifacts/pretrain/{label}/checkpoints", {"layers": 4}, {})
            tracker.finish({"validation_loss": 1.5}, "finished")
            ids[label] = str(tracker.run_id)
        tracking.finish_dag_run(uri, parent, "finished")
        registry, gates = Registry(uri), (Gate(metric="well_formed", threshold=0.5),)
        for label, score in (("pretrain_short", 0.8), ("pretrain_mid", 0.9)):
            path = f"s3://ling-flow/artifacts/pretrain/{label}/checkpoints"
            version = registry.register("browsed", path, label, {"well_formed": score}, {}, gates)
            registry.promote(version, gates)
        ids["experiment"] = mlflow_store.experiment_id(mlflow_store.connect(uri), mlflow_store.EXPERIMENT)
        yield ids


class Browser:
    """Chromium on MLflow's pages, logged in."""

    def __init__(self, driver: Any, uri: str, shots: Path) -> None:
        self.driver, self.uri, self.shots = driver, uri, shots

    def open(self, path: str) -> None:
        self.driver.get(f"{self.uri}/#{path}")
        self.driver.refresh()  # the page reads what follows '#' when it starts

    def until(self, found: Callable[[Any], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_SECONDS, ignored_exceptions=[StaleElementReferenceException]).until(
            lambda driver: found(driver)
        )

    def all(self, xpath: str) -> list[Any]:
        return list(self.driver.find_elements("xpath", xpath))

    def texts(self, *wanted: str) -> None:
        """Wait until the page shows all of them."""
        self.until(lambda driver: all(text in driver.find_element("tag name", "body").text for text in wanted))

    def shoot(self, name: str) -> None:
        for button in self.all("//button[@data-component-id='mlflow.assistant.chat_panel.close']"):
            button.click()
        self.driver.save_screenshot(str(self.shots / f"{name}.png"))

    def run_tree(self, experiment: str, name: str) -> None:
        """The list of runs, with the children of the newest run called `name` unfolded."""
        self.open(f"/experiments/{experiment}/runs")
        cell = f"//a[.//span[text()='{name}']]/ancestor::span[contains(@class, 'ag-cell-value')][1]"
        button = self.until(lambda _: self.all(f"{cell}//button"))[0]
        button.click()

    def charts(self, experiment: str, run_id: str) -> None:
        """The page of a run's metrics."""
        self.open(f"/experiments/{experiment}/runs/{run_id}/model-metrics")
        self.until(lambda _: self.all("//*[local-name()='path' and contains(@class, 'js-line')]"))


@pytest.fixture(scope="module")
def browser(stack: Stack) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver (apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    shots = Path(os.environ.get("LING_FLOW_SCREENSHOTS") or ".lingflow/screenshots").absolute()
    shots.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        for option in (*OPTIONS.split(), f"--user-data-dir={profile}"):
            options.add_argument(option)
        chrome = webdriver.Chrome(options=options, service=Service(driver))
        try:
            variables = stack.environment()
            uri = variables["MLFLOW_TRACKING_URI"]
            login = f"{variables['MLFLOW_TRACKING_USERNAME']}:{variables['MLFLOW_TRACKING_PASSWORD']}"
            chrome.get(uri)
            assert "<body></body>" in chrome.page_source  # refused: nothing is shown to whoever has no password
            chrome.get(f"http://{login}@{urlsplit(uri).netloc}/")  # what a person types into the browser's own dialog
            yield Browser(chrome, uri, shots)
        finally:
            chrome.quit()


def test_the_run_tree(browser: Browser, story: dict[str, str]) -> None:
    browser.run_tree(story["experiment"], "browsed")
    browser.texts("browsed", "pretrain_short", "pretrain_mid")
    browser.shoot("run_tree")


def test_a_metric_as_a_chart(browser: Browser, story: dict[str, str]) -> None:
    browser.charts(story["experiment"], story["pretrain_short"])
    browser.texts("pretrain_short", "loss", "validation_loss")
    browser.shoot("charts")


def test_the_model_with_its_aliases(browser: Browser, story: dict[str, str]) -> None:
    browser.open("/models/browsed")
    browser.texts("Version 1", "Version 2", "@ champion", "@ previous", "@ candidate", "passed: well_formed is 0.9")
    browser.shoot("model")
    browser.open("/models/browsed.promotions")
    browser.texts("promote version 1: passed", "promote version 2: passed")
    browser.shoot("promotions")
