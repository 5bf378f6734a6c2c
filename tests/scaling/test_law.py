"""Published laws, and `law.json` as an artifact."""

import math

import pytest

from ling_flow.errors import UserError
from ling_flow.scaling.law import LING_2_LAW, LING_2_LEVERAGE, ComputeForm, ScalingLaw, SizeAndTokensForm


@pytest.mark.parametrize(
    ("compute", "learning_rate", "batch_tokens"),
    [
        (1e18, 2.05e-3, 0.25e6),
        (1e20, 1.01e-3, 1.35e6),
        (1.36e23, 3.36e-4, 18.7e6),
        (7.1e23, 2.61e-4, 34.1e6),
        (6.5e24, 1.86e-4, 76.5e6),
    ],
)
def test_published_hyper_parameters_of_the_family(compute, learning_rate, batch_tokens):
    assert LING_2_LAW.learning_rate.at(compute) == pytest.approx(learning_rate, rel=0.01)
    assert LING_2_LAW.batch_tokens.at(compute) == pytest.approx(batch_tokens, rel=0.02)


def test_leverage_reproduces_the_published_claims():
    law = LING_2_LEVERAGE
    assert law.best_granularity == pytest.approx(11.3, abs=0.05)
    assert law.at(1 / 32, 12, 1e22) == pytest.approx(7.2, abs=0.05)
    assert law.at(1 / 32, 8, 1e22) == pytest.approx(7.1, abs=0.05)
    assert law.at(1, 2, 1e22) == pytest.approx(0.99, abs=0.01)
    assert [round(law.at(1 / 32, 8, compute), 1) for compute in (1.35e23, 7.13e23, 6.46e24)] == [9.3, 11.0, 13.7]


def test_leverage_grows_as_activation_falls_and_refuses_nonsense():
    ratios = [1, 1 / 2, 1 / 8, 1 / 32, 1 / 128]
    leverage = [LING_2_LEVERAGE.at(ratio, 12, 1e22) for ratio in ratios]
    assert leverage == sorted(leverage)
    with pytest.raises(UserError, match="activation_ratio"):
        LING_2_LEVERAGE.at(2.0, 12, 1e22)


def test_forms_are_the_formulas_they_state():
    assert ComputeForm(coefficient=10, exponent=0.1).at(1e3, 1e7) == pytest.approx(1.0)
    form = SizeAndTokensForm(
        irreducible=1.5, size_coefficient=100, size_exponent=0.5, tokens_coefficient=10, tokens_exponent=0.25
    )
    assert form.at(1e4, 1e8) == pytest.approx(1.5 + 1.0 + 0.1)


def test_law_survives_saving(fitted_law, tmp_path):
    fitted_law.save(tmp_path)
    again = ScalingLaw.load(tmp_path)
    assert again == fitted_law
    assert math.isclose(again.hyper_parameters.batch_tokens.at(1e12), fitted_law.hyper_parameters.batch_tokens.at(1e12))


@pytest.mark.parametrize("content", [None, "{", '{"schema_version": 2}', "\x00"])
def test_a_damaged_law_is_refused_by_name(content, tmp_path):
    if content is not None:
        (tmp_path / "law.json").write_text(content)
    with pytest.raises(UserError, match=r"law\.json"):
        ScalingLaw.load(tmp_path)
