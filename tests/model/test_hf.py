import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ling_flow.errors import UserError
from ling_flow.model.checkpoint_files import TensorSpec, stored_tensors
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


def test_no_weights_travel_along_with_a_tokenizer_from_another_checkpoint(
    model: BailingMoeV2ForCausalLM, saved: Path, tmp_path: Path
) -> None:
    save_pretrained(model, saved, shard_bytes=2_000_000)
    (saved / "tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path / "out", saved)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_tokenizer_files_travel_along(model: BailingMoeV2ForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path / "out", tmp_path / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_failed_save_leaves_the_old_checkpoint_whole(model: BailingMoeV2ForCausalLM, saved: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="File too large"):
            save_pretrained(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(model, load_pretrained(saved))
    with pytest.raises(UserError, match="no such directory"):
        save_pretrained(model, saved, saved / "tokenizer")


def test_mismatches_are_all_named_in_one_line(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.2.mlp.experts.99.up_proj.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(7)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_pretrained(saved)
    said = str(caught.value)
    assert "\n" not in said
    assert "missing tensors: model.layers.2.mlp.experts.3.up_proj.weight" in said
    assert "unknown tensors: model.layers.2.mlp.experts.99.up_proj.weight" in said
    assert "model.norm.weight is float32[7] instead of float32[96]" in said
    assert "lm_head.weight is float64[1024, 96] instead of float32[1024, 96]" in said


def test_a_truncated_file_is_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or unreadable"):
        load_pretrained(saved)


@pytest.fixture
def shards(model: BailingMoeV2ForCausalLM, saved: Path) -> Path:
    save_pretrained(model, saved, shard_bytes=2_000_000)
    return saved


def one_line_error(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_only_the_index_has_is_named(shards: Path) -> None:
    (shards / "model-00002-of-00004.safetensors").unlink()
    assert "model-00002-of-00004.safetensors: no such file" in one_line_error(shards)


def test_a_tensor_in_two_files_is_named(shards: Path) -> None:
    first, second = shards / "model-00001-of-00004.safetensors", shards / "model-00002-of-00004.safetensors"
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.zeros(1)}, second)
    assert f"{second.name}: holds {name}, which {first.name} holds too" in one_line_error(shards)


def test_an_index_that_is_wrong_about_a_tensor_is_named(shards: Path) -> None:
    second = shards / "model-00002-of-00004.safetensors"
    tensors = load_file(second)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, second)
    said = one_line_error(shards)
    assert f"index.json: says that {name} is in {second.name}, which does not have it" in said
    (shards / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "index.json: has no weight_map" in one_line_error(shards)


def test_a_file_that_shrinks_while_it_is_read_is_named(saved: Path) -> None:
    tensor = max(stored_tensors(saved).values(), key=lambda tensor: tensor.start)
    with tensor.path.open("rb+") as file:
        file.truncate(tensor.start + tensor.spec.nbytes - 1)
    with pytest.raises(UserError, match=rf"model\.safetensors: damaged \(ends within {tensor.name}\)"):
        tensor.load()


def test_tensors_of_a_checkpoint_are_read_one_by_one(model: BailingMoeV2ForCausalLM, shards: Path) -> None:
    expected = published_tensors(model)
    stored = stored_tensors(shards)
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert tensor.spec == TensorSpec.of(expected[name])
        assert torch.equal(tensor.load(), expected[name]), name


def test_a_type_the_model_cannot_have_is_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int64)
    save_file(tensors, saved / "model.safetensors")
    assert "model.safetensors: model.norm.weight is I64; only F64, F32, F16, BF16, F8_E4M3 are read" in one_line_error(
        saved
    )


def test_stored_types_are_widened_but_rounded_only_on_request(model: BailingMoeV2ForCausalLM, tmp_path: Path) -> None:
    half = BailingMoeV2ForCausalLM(tiny().model_copy(update={"torch_dtype": "bfloat16"}))
    half.load_state_dict(model.state_dict())
    save_pretrained(half, tmp_path)
    wide = load_pretrained(tmp_path, dtype=torch.float32)
    assert wide.config.torch_dtype == "float32"
    for name, tensor in published_tensors(wide).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, published_tensors(half)[name].float()), name

    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    name = "model.layers.0.attention.dense.weight"
    assert f"{name} is float32[96, 96] instead of bfloat16[96, 96]" in one_line_error(tmp_path)
    assert_same(load_pretrained(tmp_path, dtype=torch.bfloat16), half)
    with pytest.raises(UserError, match="torch_dtype"):
        load_pretrained(tmp_path, dtype=torch.float16)


def test_loading_goes_straight_to_the_device(saved: Path) -> None:
    assert {tensor.device.type for tensor in load_pretrained(saved, device="meta").state_dict().values()} == {"meta"}
    loaded = load_pretrained(saved)
    assert not any(gate.expert_counts.any() for gate in loaded.gates())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_onto_a_gpu(model: BailingMoeV2ForCausalLM, saved: Path) -> None:
    loaded = load_pretrained(saved, device="cuda")
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cuda"}
    assert_same(model, loaded.cpu())


def test_files_are_what_safetensors_reads_and_aligned(model: BailingMoeV2ForCausalLM, tmp_path: Path) -> None:
    half = BailingMoeV2ForCausalLM(tiny().model_copy(update={"torch_dtype": "bfloat16"}))
    half.load_state_dict(model.state_dict())
    save_pretrained(half, tmp_path)
    read = load_file(tmp_path / "model.safetensors")
    for name, tensor in published_tensors(half).items():
        assert torch.equal(read[name], tensor), name
    for tensor in stored_tensors(tmp_path).values():
        assert tensor.start % tensor.spec.dtype.itemsize == 0


@pytest.mark.parametrize(("text", "said"), [("{", "not readable as JSON"), ("[]", "must hold a JSON object")])
def test_a_damaged_config_is_named(saved: Path, text: str, said: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json: {said}"):
        load_pretrained(saved)


def test_a_directory_without_config_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_pretrained(tmp_path)
