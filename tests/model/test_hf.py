import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ling_flow.errors import UserError
from ling_flow.model.hf import load_pretrained, published_tensors, save_pretrained
from ling_flow.model.presets import mini, tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM


@pytest.fixture(scope="module")
def model() -> BailingMoeV2ForCausalLM:
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(0)
    for gate in model.gates():
        gate.expert_bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def saved(model: BailingMoeV2ForCausalLM, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_same(one: BailingMoeV2ForCausalLM, other: BailingMoeV2ForCausalLM) -> None:
    assert one.config == other.config
    ours, theirs = published_tensors(one), published_tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def layer_names(index: int, experts: int, dense: bool) -> set[str]:
    prefix = f"model.layers.{index}"
    names = {f"{prefix}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")}
    names |= {
        f"{prefix}.attention.{n}.weight" for n in ("query_key_value", "query_layernorm", "key_layernorm", "dense")
    }
    mlps = ["mlp"] if dense else ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(experts))]
    names |= {f"{prefix}.{mlp}.{n}_proj.weight" for mlp in mlps for n in ("gate", "up", "down")}
    return names if dense else names | {f"{prefix}.mlp.gate.weight", f"{prefix}.mlp.gate.expert_bias"}


def test_tensor_names_and_shapes_are_the_published_ones(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    expected = {"model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"}
    for index in range(5):
        expected |= layer_names(index, 16, dense=index == 0)
    expected |= {f"model.layers.4.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")}
    assert tensors.keys() == expected
    c = tiny()
    assert tensors["model.layers.1.mlp.experts.7.gate_proj.weight"].shape == (c.moe_intermediate_size, c.hidden_size)
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (c.hidden_size, c.moe_intermediate_size)
    assert tensors["model.layers.1.mlp.gate.expert_bias"].dtype == torch.float32


def test_mini_has_the_published_number_of_tensors_and_parameters() -> None:
    with torch.device("meta"):
        model = BailingMoeV2ForCausalLM(mini())
    tensors = published_tensors(model)
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.20.")}
    assert (len(tensors) - len(mtp), len(mtp)) == (14_813, 783)
    trunk = [tensor for name, tensor in tensors.items() if name not in mtp]
    assert sum(tensor.numel() for tensor in trunk if tensor.dtype == torch.bfloat16) == 16_255_638_528
    assert sum(tensor.numel() for tensor in trunk if tensor.dtype == torch.float32) == 4_864
    assert sum(tensor.numel() for tensor in mtp.values() if tensor.dtype == torch.bfloat16) == 827_861_248


def test_round_trip_is_bit_exact(model: BailingMoeV2ForCausalLM, saved: Path) -> None:
    assert_same(model, load_pretrained(saved))


def test_round_trip_in_bfloat16_keeps_the_bias_in_float32(model: BailingMoeV2ForCausalLM, tmp_path: Path) -> None:
    half = BailingMoeV2ForCausalLM(tiny().model_copy(update={"torch_dtype": "bfloat16"}))
    half.load_state_dict(model.state_dict())
    save_pretrained(half, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert_same(half, loaded)
    assert torch.equal(loaded.gates()[0].expert_bias, model.gates()[0].expert_bias)


def test_shards_with_an_index_round_trip_and_replace_what_was_there(
    model: BailingMoeV2ForCausalLM, saved: Path
) -> None:
    save_pretrained(model, saved, shard_bytes=2_000_000)
    names = sorted(path.name for path in saved.iterdir())
    assert "model.safetensors" not in names
    assert "model-00001-of-00004.safetensors" in names
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == published_tensors(model).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in published_tensors(model).values())
    assert_same(model, load_pretrained(saved))
    save_pretrained(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_pretrained(saved)


def test_tokenizer_files_travel_along(model: BailingMoeV2ForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path / "out", tmp_path / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_failed_save_leaves_the_old_checkpoint_whole(
    model: BailingMoeV2ForCausalLM, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ling_flow.model.hf.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(model, load_pretrained(saved))
    with pytest.raises(UserError, match="no such directory"):
        save_pretrained(model, saved, saved / "tokenizer")


def test_mismatches_are_all_named_in_one_line(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.2.mlp.experts.99.up_proj.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(7)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_pretrained(saved)
    said = str(caught.value)
    assert "\n" not in said
    assert "missing tensors: model.layers.2.mlp.experts.3.up_proj.weight" in said
    assert "unknown tensors: model.layers.2.mlp.experts.99.up_proj.weight" in said
    assert "model.norm.weight is float32[7] instead of float32[96]" in said
    assert "lm_head.weight is bfloat16[1024, 96] instead of float32[1024, 96]" in said


def test_a_truncated_file_is_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or unreadable"):
        load_pretrained(saved)


@pytest.mark.parametrize(("text", "said"), [("{", "not readable as JSON"), ("[]", "must hold a JSON object")])
def test_a_damaged_config_is_named(saved: Path, text: str, said: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json: {said}"):
        load_pretrained(saved)


def test_a_directory_without_config_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_pretrained(tmp_path)
