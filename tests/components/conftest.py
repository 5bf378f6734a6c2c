import os

import pytest
import torch

from tests.components.steps import micro_base, micro_corpus


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("LING_FLOW_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LING_FLOW_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Reference to a prepared corpus."""
    return micro_corpus({}, root=tmp_path_factory.mktemp("corpus")).refs["corpus"]


@pytest.fixture(scope="session")
def base(tmp_path_factory, corpus):
    """Reference to a base model for it."""
    return micro_base({}, root=tmp_path_factory.mktemp("base"), corpus=corpus).refs["model"]
