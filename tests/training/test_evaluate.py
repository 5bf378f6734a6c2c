import math

import numpy as np
import pytest
import torch

from ling_flow.errors import UserError
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training import evaluate
from ling_flow.training.evaluate import mixture_loss, validation_loss
from tests.training.micro import micro_model


@pytest.fixture
def model():
    model = BailingMoeV2ForCausalLM(micro_model())
    model.init_weights(seed=0)
    return model


def test_loss_is_the_mean_over_fixed_windows_of_the_validation_split(model, corpus):
    losses = validation_loss(model, corpus, 16, max_tokens=48)
    assert list(losses) == corpus.sources == ["words", "numbers"]
    tokens = np.asarray(corpus.tokens("words", "validation"), dtype=np.int64)
    available = (len(tokens) - 1) // 16
    assert available >= 3
    starts = [index * available // 3 * 16 for index in range(3)]
    rows = torch.from_numpy(np.stack([tokens[start : start + 17] for start in starts]))
    logits = model(rows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert losses["words"] == pytest.approx(expected.item(), rel=1e-5)
    assert losses["words"] == pytest.approx(math.log(288), abs=0.2)


def test_measuring_leaves_the_model_as_it_was(model, corpus):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = []
    model.gates()[0].register_forward_pre_hook(lambda gate, inputs: modes.append(gate.training))
    validation_loss(model, corpus, 16, max_tokens=64)
    assert modes and not any(modes)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(gate.expert_counts.sum() == 0 for gate in model.gates())


def test_batches_do_not_change_the_loss_and_sources_can_be_chosen(model, corpus, monkeypatch):
    whole = validation_loss(model, corpus, 16, max_tokens=256, sources=["numbers"])
    monkeypatch.setattr(evaluate, "_TOKENS_PER_FORWARD", 32)
    parts = validation_loss(model, corpus, 16, max_tokens=256, sources=["numbers"])
    assert list(parts) == ["numbers"]
    assert parts["numbers"] == pytest.approx(whole["numbers"], rel=1e-6)


def test_tokens_are_bounded_but_never_none():
    tokens = np.arange(1000, dtype=np.uint16)
    assert evaluate._windows(tokens, 16, 100, "words").shape == (6, 17)
    assert evaluate._windows(tokens, 16, 1, "words").shape == (1, 17)
    assert evaluate._windows(tokens, 16, 10**9, "words").shape == (62, 17)
    assert evaluate._windows(tokens[:10], 16, 100, "words").shape == (1, 10)
    with pytest.raises(UserError, match="'words' has 1 tokens"):
        evaluate._windows(tokens[:1], 16, 100, "words")


def test_windows_spread_over_the_split_without_overlap():
    windows = evaluate._windows(np.arange(1000, dtype=np.uint16), 16, 160, "words")
    starts = windows[:, 0]
    assert (np.diff(starts) >= 16).all()
    assert starts[0] == 0 and starts[-1] > 800


def test_mixture_weighs_the_sources():
    losses = {"words": 1.0, "numbers": 3.0, "unused": 100.0}
    assert mixture_loss(losses, {"words": 3, "numbers": 1}) == pytest.approx(1.5)
    assert mixture_loss(losses, {"words": 1, "unused": 0}) == 1.0
