"""Checkpoints as the published converter and the published modelling code write them, and what engines read of ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.hf import convert_checkpoint, load_pretrained, save_pretrained
from ling_flow.model.presets import flash, mini, one_t

VOCABULARY, HIDDEN, DENSE, EXPERT = 96, 48, 80, 24
HEADS, KV_HEADS, HEAD = 4, 2, 16
LAYERS, EXPERTS = 3, 8

# The keys of the published converter, in its order.
CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
        "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
        "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
    },
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "eos_token_id": 5,
    "pad_token_id": 5,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "model_type": "bailing_moe",
    "moe_intermediate_size": EXPERT,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_attention_heads": HEADS,
    "num_experts": EXPERTS,
    "num_key_value_heads": KV_HEADS,
    "rope_theta": 600000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_rmsnorm": True,
    "rms_norm_eps": 1e-06,
    "head_dim": HEAD,
    "num_shared_experts": 1,
    "use_cache": True,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "vocab_size": VOCABULARY,
    "partial_rotary_factor": 0.5,
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "use_qk_norm": True,
    "score_function": "sigmoid",
    "moe_shared_expert_intermediate_size": EXPERT,
}

# What each reads of config.json; a key that is missing is an error at best, and another model in silence at worst.
ENGINE_KEYS = {
    # inclusionAI/Ling-V2: models/modeling_bailing_moe_v2.py, models/configuration_bailing_moe_v2.py
    "transformers, trust_remote_code": """
        architectures auto_map attention_dropout embedding_dropout output_dropout first_k_dense_replace head_dim
        hidden_act hidden_size initializer_range intermediate_size max_position_embeddings moe_intermediate_size
        moe_router_enable_expert_bias mtp_loss_scaling_factor n_group topk_group num_attention_heads num_experts
        num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers num_shared_experts
        pad_token_id eos_token_id partial_rotary_factor rms_norm_eps rope_scaling rope_theta routed_scaling_factor
        tie_word_embeddings torch_dtype use_bias use_cache use_qk_norm use_qkv_bias vocab_size
    """,
    # vllm-project/vllm: vllm/model_executor/models/bailing_moe.py (rope_parameters is made of rope_theta, rope_scaling)
    "vLLM": """
        architectures auto_map embedding_dropout first_k_dense_replace head_dim hidden_size intermediate_size
        max_position_embeddings moe_intermediate_size moe_router_enable_expert_bias
        moe_shared_expert_intermediate_size n_group topk_group norm_topk_prob num_attention_heads num_experts
        num_experts_per_tok num_hidden_layers num_key_value_heads num_shared_experts partial_rotary_factor rms_norm_eps
        rope_scaling rope_theta routed_scaling_factor router_dtype score_function tie_word_embeddings torch_dtype
        use_bias use_qk_norm use_qkv_bias use_rmsnorm vocab_size
    """,
    # sgl-project/sglang: python/sglang/srt/models/bailing_moe.py, bailing_moe_nextn.py
    "SGLang": """
        architectures auto_map embedding_dropout first_k_dense_replace head_dim hidden_act hidden_size intermediate_size
        max_position_embeddings moe_intermediate_size moe_router_enable_expert_bias
        moe_shared_expert_intermediate_size n_group topk_group norm_topk_prob num_attention_heads num_experts
        num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers num_shared_experts
        partial_rotary_factor rms_norm_eps rope_scaling rope_theta routed_scaling_factor router_dtype score_function
        tie_word_embeddings torch_dtype use_bias use_qk_norm use_qkv_bias vocab_size
    """,
}


def feed_forward(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, HIDDEN)
    yield f"{prefix}.up_proj.weight", (width, HIDDEN)
    yield f"{prefix}.down_proj.weight", (HIDDEN, width)


def layer(index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.{index}"
    yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
    yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
    yield f"{prefix}.attention.query_key_value.weight", ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN)
    yield f"{prefix}.attention.query_layernorm.weight", (HEAD,)
    yield f"{prefix}.attention.key_layernorm.weight", (HEAD,)
    yield f"{prefix}.attention.dense.weight", (HIDDEN, HEADS * HEAD)
    if index == 0:
        yield from feed_forward(f"{prefix}.mlp", DENSE)
        return
    yield f"{prefix}.mlp.gate.weight", (EXPERTS, HIDDEN)
    yield f"{prefix}.mlp.gate.expert_bias", (EXPERTS,)
    for expert in range(EXPERTS):
        yield from feed_forward(f"{prefix}.mlp.experts.{expert}", EXPERT)
    yield from feed_forward(f"{prefix}.mlp.shared_experts", EXPERT)


def published(mtp_layers: int) -> dict[str, Tensor]:
    """A checkpoint's tensors under the published names, every element different."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for index in range(LAYERS + mtp_layers):
        shapes.update(layer(index))
    for index in range(LAYERS, LAYERS + mtp_layers):
        for name, shape in (
            ("enorm", (HIDDEN,)),
            ("hnorm", (HIDDEN,)),
            ("eh_proj", (HIDDEN, 2 * HIDDEN)),
            ("final_layernorm", (HIDDEN,)),
        ):
            shapes[f"model.layers.{index}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(torch.float32 if "expert_bias" in name else torch.bfloat16)
        for name, shape in shapes.items()
    }


def write(directory: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """Two shards and an index, as the converter leaves them."""
    directory.mkdir()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return directory


def test_every_published_tensor_lands_in_its_place(tmp_path: Path) -> None:
    tensors = published(mtp_layers=1)
    model = load_pretrained(write(tmp_path / "published", tensors, num_nextn_predict_layers=1))
    places = dict(model.state_dict())
    for index in range(LAYERS + 1):
        prefix = f"model.layers.{index}.mlp"
        stems = [prefix] if index == 0 else [f"{prefix}.shared_experts"]
        for stem in stems:
            fused = places.pop(f"{stem}.gate_up_proj.weight")
            halves = [tensors.pop(f"{stem}.{half}_proj.weight") for half in ("gate", "up")]
            assert torch.equal(fused, torch.cat(halves)), stem
        if index == 0:
            continue
        gate_up, down = places.pop(f"{prefix}.experts.gate_up_proj"), places.pop(f"{prefix}.experts.down_proj")
        for expert in range(EXPERTS):
            stem = f"{prefix}.experts.{expert}"
            for row in range(EXPERT):
                assert torch.equal(gate_up[expert, row], tensors[f"{stem}.gate_proj.weight"][row])
                assert torch.equal(gate_up[expert, EXPERT + row], tensors[f"{stem}.up_proj.weight"][row])
            assert torch.equal(down[expert], tensors[f"{stem}.down_proj.weight"])
            for name in ("gate", "up", "down"):
                del tensors[f"{stem}.{name}_proj.weight"]
        assert places[f"{prefix}.gate.expert_bias"].dtype == torch.float32
    assert places.keys() == tensors.keys()
    assert all(torch.equal(places[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_a_published_checkpoint_goes_out_as_it_came_in(tmp_path: Path, mtp_layers: int) -> None:
    tensors = published(mtp_layers)
    source = write(tmp_path / "published", tensors, num_nextn_predict_layers=mtp_layers)
    save_pretrained(load_pretrained(source), tmp_path / "saved")
    convert_checkpoint(source, tmp_path / "converted", fp8=False)
    for directory in (tmp_path / "saved", tmp_path / "converted"):
        read = load_file(directory / "model.safetensors")
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name
        config = json.loads((directory / "config.json").read_text())
        assert {key: config.get(key, "absent") for key in CONFIG} == CONFIG
        assert config["num_nextn_predict_layers"] == mtp_layers


@pytest.mark.parametrize(
    ("said", "there", "read"),
    [({}, 0, 0), ({}, 1, 1), ({"num_nextn_predict_layers": None}, 1, 1), ({"num_nextn_predict_layers": 1}, 0, 0)],
)
def test_mtp_layers_are_those_of_the_weights(
    tmp_path: Path, said: dict[str, int | None], there: int, read: int
) -> None:
    """Chat models ship without theirs, and the config class has the key as an option."""
    source = write(tmp_path / "published", published(there), **said)
    assert load_pretrained(source).config.num_nextn_predict_layers == read
    convert_checkpoint(source, tmp_path / "out", fp8=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == read


def test_part_of_an_mtp_layer_is_not_none(tmp_path: Path) -> None:
    tensors = published(1)
    del tensors[f"model.layers.{LAYERS}.eh_proj.weight"]
    source = write(tmp_path / "published", tensors, num_nextn_predict_layers=1)
    with pytest.raises(UserError, match=rf"missing tensors: model\.layers\.{LAYERS}\.eh_proj\.weight$"):
        load_pretrained(source)
    source = write(tmp_path / "two", published(2), num_nextn_predict_layers=1)
    with pytest.raises(UserError, match=rf"unknown tensors: model\.layers\.{LAYERS + 1}\."):
        load_pretrained(source)


def test_a_checkpoint_that_transformers_saved(tmp_path: Path) -> None:
    """Its save_pretrained drops model_type, as the published config class has none, renames torch_dtype in newer
    versions, and rounds the expert bias with the rest of a model in bfloat16."""
    tensors = published(0)
    biases = [name for name in tensors if name.endswith("expert_bias")]
    source = write(tmp_path / "published", {**tensors, **{name: tensors[name].bfloat16() for name in biases}})
    config = {key: value for key, value in CONFIG.items() if key not in ("model_type", "torch_dtype")}
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    places = load_pretrained(source).state_dict()
    for name in biases:
        assert places[name].dtype == torch.float32
        assert torch.equal(places[name], tensors[name].bfloat16().float())
    convert_checkpoint(source, tmp_path / "out", fp8=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["torch_dtype"]) == ("bailing_moe", "bfloat16")


@pytest.mark.parametrize("preset", [mini, flash, one_t])
@pytest.mark.parametrize("engine", ENGINE_KEYS)
def test_config_has_every_key_that_engines_read(engine: str, preset: Any) -> None:
    config: ModelConfig = preset()
    written = json.loads(json.dumps(config.to_hf()))
    assert set(ENGINE_KEYS[engine].split()) - written.keys() == set()
    assert CONFIG.keys() - written.keys() == set()
    # Engines multiply it by num_shared_experts themselves.
    assert written["moe_shared_expert_intermediate_size"] == config.moe_intermediate_size
