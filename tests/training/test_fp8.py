"""The FP8 recipe: what runs in FP8, what the safeguard sees, and that training works in each precision."""

from __future__ import annotations

import pytest
import torch

from ling_flow.data.batches import Batch
from ling_flow.errors import UserError
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.fp8 import Safeguard, fp8_weights, set_precision
from ling_flow.training.loop import StepReport, train
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import FP8Settings, OptimizerSettings, Precision


def model_in(precision: Precision, settings: FP8Settings = FP8Settings()) -> BailingMoeV2ForCausalLM:  # noqa: B008
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(0)
    set_precision(model, precision, settings)
    return model


class OneBatch:
    def batch(self, step: int) -> Batch:
        return Batch(torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0)))


def trained(model: BailingMoeV2ForCausalLM, steps: int, **told: object) -> list[StepReport]:
    reports: list[StepReport] = []
    settings = OptimizerSettings(learning_rate=2e-3)
    train(
        model, build_optimizer(model, settings), OneBatch(), steps=steps, schedule=lambda step: 2e-3,
        on_step=reports.append, **told,  # type: ignore[arg-type]
    )  # fmt: skip
    return reports


def test_what_runs_in_fp8() -> None:
    config = tiny()
    names = set(fp8_weights(model_in("fp8")))
    assert "model.layers.0.attention.query_key_value" in names
    assert "model.layers.0.mlp.gate_up_proj" in names  # dense
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert "model.layers.1.mlp.shared_experts.gate_up_proj" in names
    assert f"model.layers.{config.num_hidden_layers}.attention.dense" in names  # MTP
    assert not any("lm_head" in name or "eh_proj" in name or "gate.weight" in name for name in names)
    assert fp8_weights(model_in("bfloat16")) == {}


def test_layers_can_stay_in_bfloat16() -> None:
    names = set(fp8_weights(model_in("fp8", FP8Settings(bfloat16_layers=(0, -1)))))
    assert not any(name.startswith(("model.layers.0.", "model.layers.4.")) for name in names)
    assert any(name.startswith("model.layers.3.") for name in names)
    with pytest.raises(UserError, match=r"fp8\.bfloat16_layers: the model has layers 0 to 4 .* got 5"):
        model_in("fp8", FP8Settings(bfloat16_layers=(5,)))


def test_precision_can_change_and_float32_is_as_before() -> None:
    plain = BailingMoeV2ForCausalLM(tiny())
    plain.init_weights(0)
    model = model_in("fp8")
    rows = OneBatch().batch(0).tokens
    in_fp8 = model.loss(rows).loss
    set_precision(model, "float32", FP8Settings())
    assert torch.equal(model.loss(rows).loss, plain.loss(rows).loss)
    assert in_fp8 != plain.loss(rows).loss


def test_every_precision_learns_alike() -> None:
    precisions: tuple[Precision, ...] = ("float32", "bfloat16", "fp8")
    losses = {precision: [report.loss for report in trained(model_in(precision), 6)] for precision in precisions}
    assert losses["float32"][-1] < 0.8 * losses["float32"][0]
    for precision, tolerance in (("bfloat16", 0.02), ("fp8", 0.04)):
        for mine, exact in zip(losses[precision], losses["float32"], strict=True):
            assert abs(mine - exact) < tolerance * exact, precision


def test_weights_and_gradients_stay_float32() -> None:
    model = model_in("fp8")
    model.loss(OneBatch().batch(0).tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


def test_recomputation_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        model = model_in("fp8")
        model.recompute = recompute
        model.loss(OneBatch().batch(0).tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


def test_the_safeguard_watches_when_asked_and_changes_nothing() -> None:
    settings = FP8Settings(watch_every=3, cosine_warning=0.999999)
    plain = trained(model_in("fp8"), 4)
    model = model_in("fp8", settings)
    safeguard = Safeguard(model, settings)
    seen: list[tuple[int, int, dict[str, float]]] = []

    def on_watch(done: int, found: Safeguard) -> None:
        seen.append((done, len(found.found), found.metrics()))
        assert any("cosine to high precision" in line for line in found.warnings())

    watched = trained(model, 4, safeguard=safeguard, on_watch=on_watch)
    assert [report.loss for report in watched] == [report.loss for report in plain]
    assert [done for done, _, _ in seen] == [3]
    metrics = seen[0][2]
    assert 0.99 < metrics["fp8/cosine/forward"] < 1
    assert 0.99 < metrics["fp8/cosine/gradient"] < 1
    assert 0 <= metrics["fp8/underflow/gradient"] < 0.1


def test_the_operation_that_was_not_finite_is_named() -> None:
    model = model_in("fp8")
    weights = model.get_parameter("model.layers.2.mlp.experts.down_proj")
    with torch.no_grad():
        weights[3, 5, 7] = float("inf")
    safeguard = Safeguard(model, FP8Settings())
    lines: list[str] = []
    reports = trained(model, 1, safeguard=safeguard, on_watch=lambda done, found: lines.extend(found.warnings()))
    assert reports[0].skipped
    assert lines[0] == "fp8: model.layers.2.mlp.experts.down_proj, weight: not finite"
