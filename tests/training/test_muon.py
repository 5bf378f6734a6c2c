"""Muon: which matrices it takes, that each moves as torch's own moves it, and its checkpoints."""

import signal

import pytest
import torch

from ling_flow.data.batches import Batches
from ling_flow.data.drawn import Drawn
from ling_flow.errors import UserError
from ling_flow.model.hf import load_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.checkpoint import contents_of, list_checkpoints, load_training_state, save_checkpoint
from ling_flow.training.loop import train
from ling_flow.training.muon import orthogonalised
from ling_flow.training.optimizer import build_optimizer, hidden_matrices
from ling_flow.training.settings import OptimizerSettings, TrainingState
from tests.training.micro import micro_model, stage_settings
from tests.training.trainer import Fault, train_apart

RATE = 3e-3
ADAMW = OptimizerSettings(learning_rate=RATE)
MUON = OptimizerSettings(learning_rate=RATE, optimizer="muon")


def fresh(settings=MUON):
    model = BailingMoeV2ForCausalLM(micro_model())
    model.init_weights(seed=0)
    return model, build_optimizer(model, settings)


def run(model, optimizer, corpus, steps, start=0):
    losses = []
    batches = Batches(corpus, {"words": 1}, 16, 8, seed=0)
    train(model, optimizer, batches, steps=steps, start_step=start, schedule=lambda step: RATE,
          on_step=lambda report: losses.append(report.cross_entropy))  # fmt: skip
    return losses


def test_hidden_matrices_are_what_is_neither_embedding_nor_head_nor_router_nor_vector():
    model, _ = fresh()
    rows = hidden_matrices(model)
    others = {name for name, parameter in model.named_parameters() if parameter.dim() > 1 and parameter not in rows}
    assert others == {
        "model.word_embeddings.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.weight",
    }  # fmt: skip
    named = dict(model.named_parameters())
    assert rows[named["model.layers.0.attention.query_key_value.weight"]] == (32, 16, 16)  # 2 heads, 1, 1 of 16
    assert rows[named["model.layers.1.mlp.experts.gate_up_proj"]] == (16, 16)
    assert rows[named["model.layers.1.mlp.experts.down_proj"]] == (32,)
    assert rows[named["model.layers.0.mlp.gate_up_proj.weight"]] == (48, 48)
    for parameter, each in rows.items():
        assert sum(each) == parameter.shape[-2]


def matrices_of(model):
    """Every single matrix of the parameters that Muon takes, as a leaf of its own."""
    return [
        matrix
        for parameter, rows in hidden_matrices(model).items()
        for part in parameter.detach().split(rows, -2)
        for matrix in part.reshape(-1, *part.shape[-2:])
    ]


def test_each_matrix_moves_as_torch_moves_it_and_all_else_as_adamw_to_the_bit():
    model, optimizer = fresh()
    before = [matrix.clone() for matrix in matrices_of(model)]
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in before]
    theirs = torch.optim.Muon(alone, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    other, adamw = fresh(ADAMW)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            same.grad = parameter.grad.clone()
        grads, _ = fresh()
        for parameter, holder in zip(model.parameters(), grads.parameters(), strict=True):
            holder.data.copy_(parameter.grad)
        for matrix, grad in zip(alone, matrices_of(grads), strict=True):
            matrix.grad = grad.clone()
        optimizer.step()
        theirs.step()
        adamw.step()
    for old, ours, torchs in zip(before, matrices_of(model), alone, strict=True):
        distance = (ours - torchs).norm() / (torchs - old).norm()
        assert distance < 0.03, tuple(old.shape)  # torch's products are bfloat16, ours on a CPU float32
    rows, named = hidden_matrices(model), dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter not in rows:
            assert torch.equal(parameter, named[name]), name
            assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], adamw.state[named[name]]["exp_avg_sq"])
        else:
            assert set(optimizer.state[parameter]) == {"momentum_buffer"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 40), (3, 40, 8)])
def test_singular_values_become_near_one(shape, dtype):
    matrices = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(matrices.to(dtype))
    assert (found.shape, found.dtype) == (matrices.shape, dtype)
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert ((left @ right) * found.float()).sum() > 0.7 * values.numel()  # the same directions


def test_an_expert_without_tokens_is_left_where_decay_puts_it():
    zero = torch.zeros(2, 4, 6)
    assert torch.equal(orthogonalised(zero), zero)


def test_a_checkpoint_gives_back_every_bit(corpus, tmp_path):
    model, optimizer = fresh()
    run(model, optimizer, corpus, steps=2)
    state = TrainingState(
        stage="short", step=2, stage_start=0, tokens=256, tokens_before=0, skipped_steps=0, seconds=1, load_violation=0,
        settings=stage_settings(optimizer=MUON), drawn_before={}, drawn={"words": Drawn(tokens=256, order="")},
    )  # fmt: skip
    path = save_checkpoint(tmp_path, contents_of(model, optimizer, state))
    loaded = load_pretrained(path)
    again = build_optimizer(loaded, MUON)
    assert load_training_state(path, loaded, again) == state
    names = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        found = again.state[names[name]]
        assert found.keys() == optimizer.state[parameter].keys()
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(found[key], value), (name, key)
    assert run(loaded, again, corpus, steps=4, start=2) == run(model, optimizer, corpus, steps=4, start=2)
    for other in ("adamw", "adamw8bit"):
        with pytest.raises(UserError, match="another optimizer"):
            load_training_state(path, loaded, build_optimizer(loaded, MUON.model_copy(update={"optimizer": other})))
    model, adamw = fresh(ADAMW)
    run(model, adamw, corpus, steps=2)
    path = save_checkpoint(tmp_path / "adamw", contents_of(model, adamw, state))
    with pytest.raises(UserError, match="another optimizer"):
        load_training_state(path, loaded, build_optimizer(loaded, MUON))


def test_it_learns_with_adamws_learning_rate(corpus):
    losses = run(*fresh(), corpus, steps=60)
    adamw = run(*fresh(ADAMW), corpus, steps=60)
    assert losses[0] == adamw[0]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert sum(losses[-20:]) < 1.1 * sum(adamw[-20:])


@pytest.mark.slow
def test_a_killed_stage_ends_with_the_same_bits(corpus, tmp_path):
    settings = stage_settings(optimizer=MUON, steps=12, checkpoints_saved=3)
    assert train_apart(corpus.path, tmp_path / "whole", settings).exitcode == 0
    killed = train_apart(corpus.path, tmp_path / "killed", settings, Fault(steps=10, signal=signal.SIGKILL))
    assert killed.exitcode == -signal.SIGKILL
    end = train_apart(corpus.path, tmp_path / "killed", settings)
    assert (end.exitcode, end.error) == (0, "")
    assert 0 < end.steps < settings.steps
    one, other = (list_checkpoints(tmp_path / name)[-1] for name in ("whole", "killed"))
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
