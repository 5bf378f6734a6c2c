"""The blockwise FP8 form, held to loops over single elements."""

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.fp8_blocks import dequantize_into, quantize
from ling_flow.model.hf import convert_checkpoint, load_pretrained, published_tensors, save_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

FP8 = torch.float8_e4m3fn
# Matrices of more than one block, with blocks cut off at both edges.
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=160,
    intermediate_size=288,
    moe_intermediate_size=144,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=40,
    num_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.05,
)


@pytest.fixture(scope="module")
def model() -> BailingMoeV2ForCausalLM:
    model = BailingMoeV2ForCausalLM(CONFIG)
    model.init_weights(0)
    for gate in model.gates():
        gate.expert_bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def plain(model: BailingMoeV2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    save_pretrained(model, directory)
    return directory


@pytest.fixture
def fp8(model: BailingMoeV2ForCausalLM, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "fp8", fp8=True)
    return tmp_path / "fp8"


def in_fp8(name: str) -> bool:
    """By the published list: all projections, but not embeddings, head, norms, router and eh_proj."""
    projection = name.split(".")[-2]
    return projection in ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj")


def block_scale(values: list[float], power_of_two: bool) -> float:
    scale = max(1e-4, *(abs(value) for value in values)) / 448
    return 2.0 ** math.ceil(math.log2(scale)) if power_of_two else scale


def by_element(weight: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantised values and scales, one element after the other."""
    rows, columns = weight.shape
    stored = torch.empty(rows, columns, dtype=FP8)
    scales = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
    for block_row in range(scales.shape[0]):
        for block_column in range(scales.shape[1]):
            places = [
                (row, column)
                for row in range(128 * block_row, min(rows, 128 * block_row + 128))
                for column in range(128 * block_column, min(columns, 128 * block_column + 128))
            ]
            scale = block_scale([float(weight[place]) for place in places], power_of_two)
            scales[block_row, block_column] = scale
            for place in places:
                stored[place] = weight[place].float() / scales[block_row, block_column]
    return stored, scales


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantised_matrix_is_that_of_the_formula(power_of_two: bool) -> None:
    weight = torch.randn(130, 140, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[:128, 128:] *= 1e-6  # below the smallest scale
    weight[128:, 128:] = 0
    stored, scales = quantize(weight, power_of_two)
    expected_stored, expected_scales = by_element(weight, power_of_two)
    assert same_bytes(stored, expected_stored)
    assert torch.equal(scales, expected_scales)

    read = torch.empty(weight.shape)
    dequantize_into(read, stored, scales)
    for row, column in [(0, 0), (127, 127), (128, 0), (0, 128), (129, 139)]:
        assert read[row, column] == stored[row, column].float() * scales[row // 128, column // 128]
    # Half a step of the widest binade, 256 to 448.
    assert (read - weight.float())[:128, :128].abs().max() <= 16 * scales[0, 0]


def test_exact_powers_of_two_are_not_rounded_up() -> None:
    for exponent in range(-21, 30):
        weight = torch.full((1, 1), 448.0 * 2.0**exponent)
        assert quantize(weight, power_of_two=True)[1].item() == 2.0**exponent


def test_written_form_is_the_published_one(model: BailingMoeV2ForCausalLM, fp8: Path) -> None:
    read = load_file(fp8 / "model.safetensors")
    expected: dict[str, Tensor] = {}
    for name, tensor in published_tensors(model).items():
        if in_fp8(name):
            rounded = name.endswith("attention.dense.weight") or (
                ".mlp.experts." in name and not name.endswith("down_proj.weight")
            )
            expected[name], expected[f"{name}_scale_inv"] = quantize(tensor, rounded)
        else:
            expected[name] = tensor
    assert read.keys() == expected.keys()
    assert all(same_bytes(read[name], expected[name]) for name in expected)
    assert {str(tensor.dtype).removeprefix("torch.") for name, tensor in read.items() if "eh_proj" in name} == {
        "bfloat16"
    }
    config = json.loads((fp8 / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "eh_proj"],
    }
    assert config == model.config.to_hf()


def test_without_mtp_the_quantization_config_has_the_published_keys_alone(tmp_path: Path) -> None:
    save_pretrained(
        BailingMoeV2ForCausalLM(CONFIG.model_copy(update={"num_nextn_predict_layers": 0})), tmp_path, fp8=True
    )
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config.keys() == {"quant_method", "fmt", "activation_scheme", "weight_block_size"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loaded_weights_are_value_times_scale(fp8: Path, dtype: torch.dtype) -> None:
    read = load_file(fp8 / "model.safetensors")
    for name, tensor in published_tensors(load_pretrained(fp8, dtype=dtype)).items():
        if in_fp8(name):
            scales = read[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            assert torch.equal(tensor, (read[name].float() * scales[: tensor.shape[0], : tensor.shape[1]]).to(dtype))
        else:
            assert torch.equal(tensor, read[name].to(tensor.dtype)), name


def test_fp8_read_and_written_again_keeps_every_value(fp8: Path, tmp_path: Path) -> None:
    """And every byte, but where a power-of-two scale leaves a block's largest value at 224 or less: there, all values
    of the block double as the scale halves."""
    save_pretrained(load_pretrained(fp8), tmp_path / "again", fp8=True)
    first, again = load_file(fp8 / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    halved = 0
    for name, tensor in first.items():
        if not in_fp8(name.removesuffix("_scale_inv")) or name.endswith("_scale_inv"):
            continue
        before, after = first[f"{name}_scale_inv"], again[f"{name}_scale_inv"]
        for row in range(before.shape[0]):
            for column in range(before.shape[1]):
                block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
                if before[row, column] == after[row, column]:
                    assert torch.equal(tensor[block].float(), again[name][block].float()), name
                else:
                    halved += 1
                    assert tensor[block].float().abs().max() <= 224
                    assert before[row, column] == 2 * after[row, column]
                    assert torch.equal(2 * tensor[block].float(), again[name][block].float())
    assert halved < 10
    one, other = published_tensors(load_pretrained(fp8)), published_tensors(load_pretrained(tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_conversion_writes_what_saving_writes(plain: Path, fp8: Path, tmp_path: Path) -> None:
    convert_checkpoint(plain, tmp_path / "converted", fp8=True)
    assert files(tmp_path / "converted") == files(fp8)
    convert_checkpoint(tmp_path / "converted", tmp_path / "back", fp8=False)
    save_pretrained(load_pretrained(fp8), tmp_path / "expected")
    assert files(tmp_path / "back") == files(tmp_path / "expected")
    convert_checkpoint(plain, tmp_path / "copy", fp8=False)
    assert files(tmp_path / "copy") == files(plain)


def test_a_conversion_that_fails_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="File too large"):
            convert_checkpoint(plain, tmp_path / "out", fp8=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_conversion_keeps_other_keys_and_files_and_works_in_place(plain: Path, fp8: Path, tmp_path: Path) -> None:
    convert_checkpoint(plain, tmp_path / "here", fp8=False, shard_bytes=200_000)
    config = json.loads((tmp_path / "here" / "config.json").read_text())
    (tmp_path / "here" / "config.json").write_text(json.dumps({**config, "max_window_layers": 20}))
    (tmp_path / "here" / "tokenizer.json").write_text("{}")
    convert_checkpoint(tmp_path / "here", tmp_path / "here", fp8=True)
    assert sorted(files(tmp_path / "here")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert files(tmp_path / "here")["model.safetensors"] == files(fp8)["model.safetensors"]
    assert json.loads((tmp_path / "here" / "config.json").read_text())["max_window_layers"] == 20


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop(f"{EXPERT}_scale_inv"),
            rf"wrong tensors: {EXPERT} is float8_e4m3fn\[144, 160\] without {EXPERT}_scale_inv",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERT}_scale_inv": torch.ones(2, 1)}),
            rf"wrong tensors: {EXPERT}_scale_inv is float32\[2, 1\] instead of float32\[2, 2\]",
        ),
        (
            lambda tensors: tensors.update({EXPERT: torch.zeros(144, 160, dtype=torch.bfloat16)}),
            rf"unknown tensors: {EXPERT}_scale_inv",
        ),
    ],
)
def test_scales_must_fit_their_tensors(fp8: Path, change: Callable[[dict[str, Tensor]], object], said: str) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    change(tensors)
    save_file(tensors, fp8 / "model.safetensors")
    with pytest.raises(UserError, match=said):
        load_pretrained(fp8)


@pytest.mark.parametrize("change", [{"weight_block_size": [64, 64]}, {"quant_method": "gptq"}])
def test_another_quantisation_is_refused(fp8: Path, change: dict[str, object]) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"].update(change)
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json\.quantization_config: only"):
        load_pretrained(fp8)
