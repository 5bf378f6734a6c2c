import subprocess
import sys
from typing import Any

import pytest

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig, Yarn
from ling_flow.model.flops import training_flops_per_token
from ling_flow.model.presets import MODEL_PRESETS, model_preset


@pytest.mark.parametrize(
    ("name", "total", "bias", "active", "active_non_embedding", "mtp"),
    [
        ("mini", 16_255_638_528, 4_864, 1_432_968_192, 789_142_528, 827_861_248),
        ("flash", 102_889_697_280, 7_936, 6_152_269_824, 4_864_618_496, 3_306_180_864),
        ("one_t", 999_705_309_184, 19_456, 51_054_407_680, 48_479_105_024, 13_222_584_576),
    ],
)
def test_published_parameter_counts(
    name: str, total: int, bias: int, active: int, active_non_embedding: int, mtp: int
) -> None:
    counts = model_preset(name).parameter_counts()
    assert (counts.total, counts.expert_bias, counts.active, counts.active_non_embedding, counts.mtp) == (
        total,
        bias,
        active,
        active_non_embedding,
        mtp,
    )


@pytest.mark.parametrize(("name", "compute"), [("mini", 1.35e23), ("flash", 7.13e23), ("one_t", 6.46e24)])
def test_flops_reproduce_the_compute_of_the_published_runs(name: str, compute: float) -> None:
    """20 T tokens of 4096: the values that also follow from the published learning rates by the scaling law."""
    assert training_flops_per_token(model_preset(name), 4096).non_embedding * 20e12 == pytest.approx(compute, rel=5e-3)


def test_small_is_about_ten_times_tiny() -> None:
    ratio = model_preset("small").parameter_counts().active / model_preset("tiny").parameter_counts().active
    assert 8 < ratio < 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok must be at most num_experts (16), got 17"),
        ({"num_experts_per_tok": 9}, "must fit in topk_group"),
        ({"n_group": 5}, "must be a multiple of n_group"),
        ({"n_group": 16}, "at least 2 experts per group"),
        ({"topk_group": 5}, "topk_group must be at most n_group"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "must be a multiple of num_key_value_heads"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace must be at most num_hidden_layers"),
        ({"partial_rotary_factor": 0.02}, "partial_rotary_factor"),
        ({"eos_token_id": 4096}, "eos_token_id must be below vocab_size"),
        ({"hidden_sise": 64}, "did you mean 'hidden_size'?"),
    ],
)
def test_wrong_architectures_are_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(ModelConfig, {**model_preset("tiny").model_dump(), **change}, "model")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="tiny, small, mini, flash, one_t"):
        model_preset("huge")


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_published_config_round_trip(name: str) -> None:
    config = model_preset(name)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_is_read_under_both_names_of_its_kind(key: str) -> None:
    """128K as in the published instructions; transformers writes `rope_type`."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, key: "yarn"}
    published = {**model_preset("mini").to_hf(), "max_position_embeddings": 131072, "rope_scaling": scaling}
    config = ModelConfig.from_hf(published)
    assert config.rope_scaling == Yarn(factor=4.0, original_max_position_embeddings=32768)
    assert config.to_hf()["rope_scaling"] == {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_published_config_has_the_keys_that_engines_fail_on_in_silence() -> None:
    published = model_preset("mini").to_hf()
    expected = {
        "model_type": "bailing_moe",
        "architectures": ["BailingMoeV2ForCausalLM"],
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 2.5,
        "use_rmsnorm": True,
        "use_qk_norm": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "n_group": 8,
        "topk_group": 4,
        "torch_dtype": "bfloat16",
        "eos_token_id": 156892,
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
    }
    assert {key: published[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type must be 'bailing_moe'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.original_max_position_embeddings"),
        ({"score_function": "softmax"}, "score_function: only 'sigmoid' is supported"),
        ({"moe_shared_expert_intermediate_size": 7}, "must equal moe_intermediate_size"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ModelConfig.from_hf({**model_preset("tiny").to_hf(), **change})


def test_the_rotated_elements_may_be_given_as_a_number() -> None:
    published = model_preset("mini").to_hf()
    assert published["rotary_dim"] == 64
    del published["partial_rotary_factor"]
    assert ModelConfig.from_hf(published) == model_preset("mini")


def test_a_config_without_rotary_share_is_refused_because_engines_would_guess() -> None:
    published = model_preset("tiny").to_hf()
    del published["partial_rotary_factor"], published["rotary_dim"]
    with pytest.raises(UserError, match="partial_rotary_factor: required"):
        ModelConfig.from_hf(published)


def test_configuration_needs_no_torch() -> None:
    code = "import sys; import ling_flow.model.presets, ling_flow.model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
