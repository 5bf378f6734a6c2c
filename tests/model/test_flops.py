"""FLOPs per token by part, held to PyTorch's own counter; and the cost they make."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ling_flow.model.config import ModelConfig
from ling_flow.model.cost import CostOptions, training_cost
from ling_flow.model.flops import forward_flops_per_token, training_flops_per_token
from ling_flow.model.presets import MODEL_PRESETS, model_preset, tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM


def counted(model: BailingMoeV2ForCausalLM, rows: torch.Tensor, part: str) -> int:
    """Matrix-product FLOPs of modules whose name ends with `part`, attention kernels aside."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(rows)
    return sum(
        flops
        for name, operations in counter.get_flop_counts().items()
        if name.endswith(part)
        for operation, flops in operations.items()
        if "attention" not in str(operation)
    )


@pytest.mark.usefixtures("unpadded_experts")
def test_every_part_is_what_pytorch_counts() -> None:
    config = ModelConfig.model_validate({**tiny().model_dump(), "first_k_dense_replace": 2})
    model = BailingMoeV2ForCausalLM(config)
    model.init_weights(0)
    rows = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    flops = forward_flops_per_token(config, 24)
    expected = {
        "attention": flops.attention_projections,
        "layers.0.mlp": flops.dense // 2,
        "gate": flops.router,
        "mlp.experts": flops.routed_experts,
        "shared_experts": flops.shared_experts,
        "lm_head": flops.head,
    }
    assert {part: counted(model, rows, part) / rows.numel() for part in expected} == expected


def test_scores_grow_with_the_context_and_causal_ones_are_half() -> None:
    config = model_preset("mini")
    long, short = (forward_flops_per_token(config, length) for length in (32768, 4096))
    assert long.attention_scores == 8 * short.attention_scores == 8 * 20 * 4 * 4096 * 16 * 128
    assert long.attention_projections == short.attention_projections
    causal = forward_flops_per_token(config, 4096, "causal")
    # Position i sees i keys: the exact sum over positions, not about a half.
    assert causal.attention_scores * 4096 == sum(20 * 4 * seen * 16 * 128 for seen in range(1, 4097))
    assert causal.total < short.total
    assert causal.experts == short.experts


def test_mtp_layers_are_counted_whole_and_one_by_one() -> None:
    one, two = (forward_flops_per_token(tiny().model_copy(update={"num_nextn_predict_layers": n}), 128) for n in (1, 2))
    assert two.mtp == 2 * one.mtp
    assert two.non_embedding == one.non_embedding
    deeper = forward_flops_per_token(tiny().model_copy(update={"num_hidden_layers": 5}), 128)
    # An MTP layer is a decoder layer, a projection from 2·D to D, and the head once more.
    assert one.mtp == deeper.non_embedding - one.non_embedding + 4 * 96 * 96 + one.head


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_training_is_three_times_forward_and_recomputation_once_more(name: str) -> None:
    config = model_preset(name)
    forward, training = forward_flops_per_token(config, 4096), training_flops_per_token(config, 4096)
    again = training_flops_per_token(config, 4096, recompute=True)
    assert training.total == 3 * forward.total
    assert again.non_embedding == 4 * forward.non_embedding
    assert (again.head, again.mtp_heads) == (3 * forward.head, 3 * forward.mtp_heads)
    assert again.total - training.total == forward.non_embedding + forward.mtp_layers


@pytest.mark.parametrize(("name", "flops"), [("tiny", 2_608_128), ("small", 37_109_760)])
def test_the_wind_tunnels_unit_of_compute_stays(name: str, flops: int) -> None:
    """Recorded trials and laws are in this unit."""
    assert training_flops_per_token(model_preset(name), 128).non_embedding == flops


@pytest.mark.parametrize(("name", "law"), [("mini", 1.35e23), ("flash", 7.13e23), ("one_t", 6.46e24)])
def test_cost_of_the_published_runs(name: str, law: float) -> None:
    config = model_preset(name)
    cost = training_cost(config, CostOptions(mfu=0.5, peak_tflops=1000, watts=500))
    assert cost.law_flops == pytest.approx(law, rel=5e-3)
    assert cost.flops == 20e12 * training_flops_per_token(config, 4096).total
    assert cost.gpu_hours == pytest.approx(cost.flops / (0.5 * 1e15 * 3600))
    assert cost.energy_kwh == pytest.approx(cost.gpu_hours / 2)
    causal = training_cost(config, CostOptions(scores="causal", gpu="h20"))
    assert causal.law_flops == cost.law_flops, "the laws count full scores whatever is paid for"
    assert causal.flops < cost.flops
    assert causal.gpu_hours == pytest.approx(causal.flops / (0.35 * 148e12 * 3600))
