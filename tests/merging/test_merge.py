import json

import pytest
import torch
from safetensors.torch import load_file

from ling_flow.errors import UserError
from ling_flow.merging.merge import merge_checkpoints
from ling_flow.model.checkpoint_files import SHARD_BYTES, TensorSpec, write_weights

SHAPES = {"model.norm.weight": (4,), "lm_head.weight": (6, 4), "model.layers.1.mlp.gate.expert_bias": (3,), "scale": ()}


def write(path, tensors, shard_bytes=SHARD_BYTES):
    write_weights(path, {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, tensors.items(), shard_bytes)


def make_checkpoint(path, seed, dtype=torch.bfloat16, changes=None, config=None, shard_bytes=50):
    """A small checkpoint, bfloat16 but for its float32 expert_bias; by default in two shards."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    bias = "model.layers.1.mlp.gate.expert_bias"
    tensors[bias] = tensors[bias].float()
    tensors.update(changes or {})
    tensors = {name: tensors[name] for name in sorted(tensors) if tensors[name] is not None}
    path.mkdir()
    write(path, tensors, shard_bytes)
    (path / "config.json").write_text(json.dumps({"hidden_size": 4, **(config or {})}))
    (path / "tokenizer.json").write_text("{}")
    (path / "training_state").mkdir()
    (path / "training_state" / "state.json").write_text("{}")
    return path


def load(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_merge_is_the_weighted_mean_in_float32_rounded_once(tmp_path):
    paths = [make_checkpoint(tmp_path / f"step-{i}", seed=i) for i in range(3)]
    weights = [0.5, 0.3, 0.2]
    merge_checkpoints(paths, weights, tmp_path / "merged")
    merged, sources = load(tmp_path / "merged"), [load(path) for path in paths]
    assert set(merged) == set(SHAPES)
    for name, tensor in merged.items():
        expected = sum(weight * source[name].double() for weight, source in zip(weights, sources, strict=True))
        assert tensor.dtype == sources[0][name].dtype
        rtol = 1e-6 if tensor.dtype == torch.float32 else 0
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=rtol, atol=1e-7)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {"hidden_size": 4}
    assert not (tmp_path / "merged" / "training_state").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "step-0", "step-1", "step-2"]


def test_merge_of_one_checkpoint_is_that_checkpoint(tmp_path):
    path = make_checkpoint(tmp_path / "step-0", seed=0, shard_bytes=SHARD_BYTES)
    merge_checkpoints([path], [1.0], tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_shards_may_be_cut_differently(tmp_path):
    first, second = (make_checkpoint(tmp_path / f"step-{i}", i, shard_bytes=size) for i, size in enumerate((1, 50)))
    assert [len(list(path.glob("*.safetensors"))) for path in (first, second)] == [4, 2]
    merge_checkpoints([first, second], [0.5, 0.5], tmp_path / "merged")
    merged, one, other = load(tmp_path / "merged"), load(first), load(second)
    for name in SHAPES:
        expected = (one[name].float() + other[name].float()) / 2
        assert torch.equal(merged[name], expected.to(merged[name].dtype))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"changes": {"model.norm.weight": torch.zeros(5).bfloat16()}},
            r"step-b: tensor model.norm.weight is bfloat16\[5\], but bfloat16\[4\] in step-a",
        ),
        ({"changes": {"lm_head.weight": None}}, "step-b: tensor lm_head.weight is missing"),
        ({"changes": {"extra": torch.zeros(1)}}, "step-a: tensor extra is missing, but step-b has it"),
        ({"changes": {"scale": torch.zeros(())}}, r"step-b: tensor scale is float32\[\], but bfloat16\[\] in step-a"),
        (
            {"changes": {"scale": torch.zeros((), dtype=torch.float64)}},
            "step-b.*scale is float64.*only float32, float16, b",
        ),
        ({"config": {"hidden_size": 8}}, "step-b.*hidden_size = 8"),
    ],
)
def test_checkpoints_of_different_models_are_refused(tmp_path, second, message):
    make_checkpoint(tmp_path / "step-b", seed=1, **second)
    make_checkpoint(tmp_path / "step-a", seed=0)
    with pytest.raises(UserError, match=message):
        merge_checkpoints([tmp_path / "step-b", tmp_path / "step-a"], [0.5, 0.5], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_damage_names_the_file_and_leaves_nothing(tmp_path):
    paths = [make_checkpoint(tmp_path / f"step-{i}", seed=i) for i in range(2)]
    shard = paths[0] / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-0/model-00002-of-00002.safetensors: damaged"):
        merge_checkpoints(paths, [0.5, 0.5], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-1"]


def test_wrong_number_of_weights_and_a_full_destination_are_refused(tmp_path):
    path = make_checkpoint(tmp_path / "step-0", seed=0)
    with pytest.raises(UserError, match="2 weights for 1 checkpoints"):
        merge_checkpoints([path], [0.5, 0.5], tmp_path / "merged")
    with pytest.raises(UserError, match="holds files already"):
        merge_checkpoints([path], [1.0], path)
