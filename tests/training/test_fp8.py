"""The FP8 recipe: what runs in FP8, what the safeguard sees, and that training works in each precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ling_flow.data.batches import Batch
from ling_flow.errors import UserError
from ling_flow.kernels import fp8_layers
from ling_flow.kernels.row_map import RowMap
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training import fp8
from ling_flow.training.fp8 import OperationError, Safeguard, fp8_weights, set_precision
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


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"precision: fp8 needs a GPU of compute capability 8\.9 or later .* this one has 8\.0: use bfloat16"
    monkeypatch.setattr(fp8, "_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=line):
        model_in("fp8")
    assert fp8_weights(model_in("bfloat16")) == {}
    for known in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(fp8, "_capability", lambda device, known=known: known)
        assert fp8_weights(model_in("fp8"))


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


def _random(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def instead(*arguments: Any, **more: Any) -> Tensor:
        found = product(*arguments, **more)
        return torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found.dtype) * found.std()

    return instead


def _doubled(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **more: 2 * product(*arguments, **more)


def _one_expert_doubled(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def instead(x: Any, w: Any, where: RowMap, *more: Any, **by_name: Any) -> Tensor:
        found = product(x, w, where, *more, **by_name)
        expert, rows = where.filled()[-1]
        found[expert if found.dim() == 3 else rows] *= 2
        return found

    return instead


def test_nothing_is_told_of_what_is_right() -> None:
    model = model_in("fp8")
    safeguard = Safeguard(model, FP8Settings())
    with safeguard.watching():
        model.loss(OneBatch().batch(0).tokens).loss.backward()
    assert safeguard.warnings() == []
    assert len(safeguard.found) == 8 * len(fp8_weights(model))
    assert all(abs(value - 1) < 0.02 for name, value in safeguard.metrics().items() if name.startswith("fp8/norm/"))


@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("wrong", [_random, _doubled, _one_expert_doubled])
def test_a_wrong_product_is_told(
    product: str, wrong: Callable[..., Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_in("fp8")
    safeguard = Safeguard(model, FP8Settings())
    name = f"grouped_{product}_fp8"
    monkeypatch.setattr(fp8_layers, name, wrong(getattr(fp8_layers, name)))
    with safeguard.watching():
        model.loss(OneBatch().batch(0).tokens).loss.backward()
    told = "cosine to high precision" if wrong is _random else "2 times as large as in high precision"
    for layer in ("experts.gate_up_proj", "experts.down_proj", "shared_experts.down_proj"):
        lines = [line for line in safeguard.warnings() if f"2.mlp.{layer}, {product}: " in line]
        assert len(lines) == 1 and told in lines[0]


def test_slices_and_parts_are_compared_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    found = exact.to(torch.float8_e4m3fn).float() * 1.01
    found[exact.abs() < 0.1] = 0

    def compared(slice_: int, *parts: tuple[Tensor, Tensor]) -> OperationError:
        monkeypatch.setattr(fp8, "SLICE", slice_)
        safeguard = Safeguard(model, FP8Settings())
        with safeguard.watching():
            watch = fp8_weights(model)[layer].watch
            assert watch is not None
            for part in parts:
                watch("forward", *part)
        return safeguard.found[0]

    model, layer = model_in("fp8"), "model.layers.0.attention.dense"
    whole, sliced = compared(1000, (exact, found)), compared(10, (exact, found))
    wide, narrow = exact.double(), found.double()
    assert whole.underflow == sliced.underflow == ((found == 0) & (exact != 0)).double().mean().item()
    cosine, norm = float((wide * narrow).sum() / wide.norm() / narrow.norm()), float(narrow.norm() / wide.norm())
    assert whole[3:] == pytest.approx((cosine, norm, True), abs=1e-12)
    assert sliced[3:] == pytest.approx((cosine, norm, True), abs=1e-12)
    worst = compared(1000, (exact, 0.5 * exact), (exact, found), (exact * torch.inf, exact), (exact, 1.4 * exact))
    assert worst == (layer, "forward", whole.underflow, whole.cosine, 0.5, False)
    assert compared(1000, (0 * exact, exact)).norm == torch.inf  # say, what is left in a gradient without rows
    assert compared(1000, (exact[:0], found[:0]))[2:] == (0.0, 1.0, 1.0, True)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        made = [found] if isinstance(found, Tensor) else []
        shared = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        self.bytes = max(
            [self.bytes, *(tensor.nbytes for tensor in made if tensor.untyped_storage().data_ptr() not in shared)]
        )
        return found


def test_comparing_weights_takes_no_more_than_an_expert_and_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "SLICE", 2**12)
    weight = torch.randn(16, 256, 128, generator=torch.Generator().manual_seed(0))
    model = model_in("fp8")
    kept = fp8_weights(model)["model.layers.1.mlp.experts.down_proj"]
    quantized, safeguard = kept.quantized(weight), Safeguard(model, FP8Settings())
    with safeguard.watching(), _Largest() as largest:
        assert kept.watch is not None
        fp8_layers._watch_weights(kept.watch, weight, quantized)
    assert 0 < largest.bytes <= weight[0].nbytes
    assert len(safeguard.found) == 1 and 0.999 < safeguard.found[0].cosine < 1


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
