import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_flow.errors import UserError
from ling_flow.merging.weights import CURVES, merge_weights, weights_from_decay

# WSM Figure 2 (EMA) and the closed forms of the other curves, ten checkpoints, oldest first.
PUBLISHED = {
    "mean": [0.100] * 10,
    "linear": [0.100] * 10,
    "1-sqrt": [0.316, 0.131, 0.101, 0.085, 0.075, 0.067, 0.062, 0.058, 0.054, 0.051],
    "cosine": [0.024, 0.071, 0.111, 0.139, 0.155, 0.155, 0.139, 0.111, 0.071, 0.024],
    "ema": [0.126, 0.033, 0.041, 0.052, 0.065, 0.082, 0.103, 0.130, 0.163, 0.206],
}


@pytest.mark.parametrize("curve", PUBLISHED)
def test_weights_of_ten_checkpoints_match_the_published_ones_to_three_digits(curve):
    assert [round(weight, 3) for weight in merge_weights(curve, 10)] == PUBLISHED[curve]


def test_every_curve_has_a_published_row():
    assert set(CURVES) == set(PUBLISHED)


@given(st.sampled_from(sorted(CURVES)), st.integers(1, 64))
def test_weights_are_a_distribution(curve, checkpoints):
    weights = merge_weights(curve, checkpoints)
    assert len(weights) == checkpoints
    assert all(weight >= 0 for weight in weights)
    assert math.isclose(sum(weights), 1, rel_tol=1e-12)


decays = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True))


@given(decays, st.integers(0, 2**31))
def test_merge_equals_the_run_with_decayed_updates(decay, seed):
    """Theorem 3.1 by simulation: same updates, once merged, once scaled by the decay."""
    import numpy as np

    updates = np.random.default_rng(seed).normal(size=(len(decay), 3))
    constant_rate = np.concatenate([np.zeros((1, 3)), -np.cumsum(updates, axis=0)]) + 5.0
    decayed = 5.0 - sum(factor * update for factor, update in zip(decay, updates, strict=True))
    merged = sum(weight * point for weight, point in zip(weights_from_decay(decay), constant_rate, strict=True))
    np.testing.assert_allclose(merged, decayed, atol=1e-12)


@pytest.mark.parametrize("decay", [[0.5, 0.6], [1.1], [0.5, -0.1]])
def test_a_decay_no_merge_can_stand_in_for_is_refused(decay):
    with pytest.raises(UserError, match="decay factors"):
        weights_from_decay(decay)


def test_unknown_curve_and_empty_merge_are_refused():
    with pytest.raises(UserError, match=r"curve: must be one of .*1-sqrt.*'wsd'"):
        merge_weights("wsd", 4)
    with pytest.raises(UserError, match="at least 1"):
        merge_weights("mean", 0)
