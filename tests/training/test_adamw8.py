"""The optimizer with 8-bit moments: its state, its checkpoints, and how near its training stays to float32's."""

import pytest
import torch

from ling_flow.data.batches import Batches
from ling_flow.data.drawn import Drawn
from ling_flow.errors import UserError
from ling_flow.model.hf import load_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.adamw8 import AdamW8bit
from ling_flow.training.checkpoint import contents_of, load_training_state, save_checkpoint
from ling_flow.training.loop import train
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import OptimizerSettings, TrainingState
from tests.training.micro import micro_model, stage_settings

ADAMW8 = OptimizerSettings(learning_rate=3e-3, optimizer="adamw8bit")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32}  # matrices large enough for 8 bits


def fresh(optimizer, **changes):
    model = BailingMoeV2ForCausalLM(micro_model(**WIDE, **changes))
    model.init_weights(seed=0)
    return model, build_optimizer(model, optimizer)


def run(model, optimizer, corpus, steps, start=0):
    losses = []
    batches = Batches(corpus, {"words": 1}, 16, 8, seed=0)
    train(model, optimizer, batches, steps=steps, start_step=start, schedule=lambda step: 3e-3,
          on_step=lambda report: losses.append(report.cross_entropy))  # fmt: skip
    return losses


def states(model, optimizer):
    return {
        (name, key): value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def test_matrices_have_8_bits_and_all_else_is_adamw_to_the_bit(corpus):
    model, optimizer = fresh(ADAMW8)
    run(model, optimizer, corpus, steps=1)
    other, exact = fresh(OptimizerSettings(learning_rate=3e-3))
    run(other, exact, corpus, steps=1)
    named = dict(other.named_parameters())
    kinds = set()
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        kinds.add(state["exp_avg"].dtype)
        assert (state["exp_avg"].dtype == torch.uint8) == (parameter.dim() > 1 and parameter.numel() >= 4096)
        if state["exp_avg"].dtype == torch.float32:
            assert torch.equal(parameter, named[name])
            assert torch.equal(state["exp_avg_sq"], exact.state[named[name]]["exp_avg_sq"])
        else:  # the first step knows nothing of 8 bits yet
            torch.testing.assert_close(parameter, named[name])
    assert kinds == {torch.uint8, torch.float32}


def test_a_checkpoint_gives_back_every_bit(corpus, tmp_path):
    model, optimizer = fresh(ADAMW8)
    run(model, optimizer, corpus, steps=2)
    settings = stage_settings(optimizer=ADAMW8)
    state = TrainingState(
        stage="short", step=2, stage_start=0, tokens=256, tokens_before=0, skipped_steps=0, seconds=1, load_violation=0,
        settings=settings, drawn_before={}, drawn={"words": Drawn(tokens=256, order="")},
    )  # fmt: skip
    path = save_checkpoint(tmp_path, contents_of(model, optimizer, state))
    loaded = load_pretrained(path)
    again = build_optimizer(loaded, ADAMW8)
    assert load_training_state(path, loaded, again) == state
    for (name, key), value in states(model, optimizer).items():
        found = again.state[dict(loaded.named_parameters())[name]][key]
        assert found.dtype == value.dtype
        assert torch.equal(found, value), (name, key)
    assert run(loaded, again, corpus, steps=4, start=2) == run(model, optimizer, corpus, steps=4, start=2)
    with pytest.raises(UserError, match="another optimizer"):
        load_training_state(path, loaded, build_optimizer(loaded, OptimizerSettings(learning_rate=3e-3)))


def test_state_dict_gives_back_every_bit(corpus):
    model, optimizer = fresh(ADAMW8)
    run(model, optimizer, corpus, steps=2)
    again = build_optimizer(model, OptimizerSettings(learning_rate=1.0, optimizer="adamw8bit"))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 3e-3
    before = states(model, optimizer)
    for key, value in states(model, again).items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])


def test_training_stays_near_that_of_float32_moments(corpus):
    settings = OptimizerSettings(learning_rate=3e-3)
    exact = run(*fresh(settings), corpus, steps=150)
    ours = run(*fresh(ADAMW8), corpus, steps=150)
    assert ours[0] == exact[0]
    assert sum(exact[-30:]) < 0.7 * sum(exact[:30])
    # Changing all initial weights by 1e-5 moves float32's own result by up to 1%.
    assert sum(ours[-30:]) == pytest.approx(sum(exact[-30:]), rel=2e-2)


def test_a_parameter_without_gradient_is_left_alone():
    one, other = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    optimizer = AdamW8bit([one, other], lr=1e-2)
    one.grad = torch.ones(64, 64)
    optimizer.step()
    assert one.lt(1).all()
    assert other.eq(1).all()
    assert other not in optimizer.state
