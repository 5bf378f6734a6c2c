"""The dense model of equal loss, by the published efficiency-leverage law."""

import pytest

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.model.presets import mini, model_preset
from ling_flow.scaling.law import LING_2_LEVERAGE
from ling_flow.scaling.leverage import dense_equivalent, leverage_of


def test_published_claims() -> None:
    assert LING_2_LEVERAGE.at(0.031, 12, 1e22) == pytest.approx(7.2, abs=0.1)
    assert LING_2_LEVERAGE.best_granularity == pytest.approx(11.3, abs=0.05)
    assert LING_2_LEVERAGE.at(1, 8, 1e22) == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize(("name", "at_budget"), [("mini", 9.3), ("flash", 11.0), ("one_t", 13.7)])
def test_the_family_has_seven_times_leverage_and_more_at_its_own_budgets(name: str, at_budget: float) -> None:
    config = model_preset(name)
    assert leverage_of(config, 1e22) == pytest.approx(7.1, abs=0.05)
    assert leverage_of(config, 1e22) >= 7
    equivalent = dense_equivalent(config, 4096, 20e12)
    assert equivalent.leverage == pytest.approx(at_budget, abs=0.05)
    moe = training_flops_per_token(config, 4096).non_embedding
    dense = training_flops_per_token(equivalent.config, 4096)
    assert equivalent.compute_flops == moe * 20e12
    assert dense.non_embedding == pytest.approx(equivalent.leverage * moe, rel=0.01)
    assert dense.experts == dense.router == dense.mtp == 0


def test_the_dense_model_is_valid_and_shaped_like_the_family() -> None:
    config, dense = mini(), dense_equivalent(mini(), 4096, 20e12).config
    assert parse(ModelConfig, dense.model_dump(), "dense") == dense
    assert dense.hidden_size / dense.num_attention_heads == config.hidden_size / config.num_attention_heads
    assert dense.intermediate_size / dense.hidden_size == config.intermediate_size / config.hidden_size
    depth = dense.num_hidden_layers / dense.hidden_size
    assert depth == pytest.approx(config.num_hidden_layers / config.hidden_size, rel=0.35)
    # A mixture of 0.8 B active parameters against a dense model of some 9 B: the report's "one seventh" and more.
    assert 8e9 < dense.parameter_counts().active_non_embedding < 10e9


def test_more_tokens_need_a_larger_dense_model() -> None:
    sizes = [dense_equivalent(mini(), 4096, tokens).config.parameter_counts().total for tokens in (1e11, 1e12, 2e13)]
    assert sizes == sorted(set(sizes))


def test_a_dense_model_has_no_leverage() -> None:
    dense = mini().model_copy(update={"first_k_dense_replace": 20})
    with pytest.raises(UserError, match="no mixture-of-experts layer"):
        dense_equivalent(dense, 4096, 20e12)
