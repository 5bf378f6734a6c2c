import pytest
import torch

from components.merge_checkpoints import merge_checkpoints
from components.pretrain import pretrain
from ling_flow.errors import UserError
from ling_flow.merging.weights import merge_weights
from ling_flow.model.hf import load_pretrained
from tests.components.pretraining import config, make_inputs
from tests.components.test_pretrain import Recorder

MERGE = {"last_k": 3, "validation_tokens": 64, "threads": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def inputs(root, tmp_path_factory):
    return make_inputs(root, tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def trained(root, inputs):
    return pretrain(config(tokens=64 * 40, checkpoints_saved=8, checkpoints_kept=4), root=root, **inputs)


def given(trained, inputs):
    return {"checkpoints": trained.refs["checkpoints"], "corpus": inputs["corpus"]}


@pytest.mark.parametrize("curve", ["mean", "1-sqrt"])
def test_model_is_the_weighted_mean_of_the_last_checkpoints(trained, root, inputs, curve):
    outcome = merge_checkpoints({**MERGE, "curve": curve, "compare_curve": None}, root=root, **given(trained, inputs))
    merged = load_pretrained(outcome.outputs["model"]).state_dict()
    names = ["step-00000030", "step-00000035", "step-00000040"]
    sources = [load_pretrained(trained.outputs["checkpoints"] / name).state_dict() for name in names]
    weights = merge_weights(curve, 3)
    for name, tensor in merged.items():
        expected = sum(weight * source[name].double() for weight, source in zip(weights, sources, strict=True))
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=1e-5, atol=1e-7)
        if name.endswith("expert_bias"):
            assert tensor.dtype == torch.float32
            assert tensor.abs().max() > 0
            assert tensor.sum().abs() < 1e-6
    assert (outcome.outputs["model"] / "tokenizer.json").exists()
    assert not (outcome.outputs["model"] / "training_state").exists()
    contracts = outcome.manifest.outputs["model"].contract, trained.manifest.outputs["checkpoints"].contract
    assert contracts[0] == contracts[1]


def test_result_compares_the_merge_with_each_checkpoint(trained, root, inputs):
    tracker = Recorder()
    outcome = merge_checkpoints(MERGE, root=root, tracker=tracker, **given(trained, inputs))
    result = outcome.result
    singles = [tracker.seen[step]["validation_loss_single"] for step in (30, 35, 40)]
    assert result.validation_loss_last == singles[-1] == pytest.approx(trained.result.validation_loss, rel=1e-9)
    assert result.validation_loss_best_single == min(singles)
    assert result.merged_checkpoints == 3
    assert result.validation_loss_merged == tracker.seen[40]["validation_loss_merged/mean"]
    assert tracker.seen[40]["validation_loss_merged/1-sqrt"] != result.validation_loss_merged
    assert abs(result.validation_loss_merged - result.validation_loss_last) < 0.5


def test_more_checkpoints_than_there_are_is_refused(trained, root, inputs):
    with pytest.raises(UserError, match=r"last_k: 5 asked for, but .* kept 4; lower it or raise checkpoints_kept"):
        merge_checkpoints({**MERGE, "last_k": 5}, root=root, **given(trained, inputs))


def test_unknown_curve_is_refused(trained, root, inputs):
    with pytest.raises(UserError, match=r"merge_checkpoints.curve: .*'1-sqrt'"):
        merge_checkpoints({**MERGE, "curve": "wsd"}, root=root, **given(trained, inputs))


def test_another_tokenizer_is_refused(trained, root, inputs, tmp_path):
    other = make_inputs(root, tmp_path, seed=2)["corpus"]
    with pytest.raises(UserError, match="tokenizer"):
        merge_checkpoints(MERGE, root=root, checkpoints=trained.refs["checkpoints"], corpus=other)
