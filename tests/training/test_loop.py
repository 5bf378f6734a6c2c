import math

import pytest
import torch

from ling_flow.data.batches import Batch, Batches
from ling_flow.errors import SystemFault
from ling_flow.model.config import RouterLoss
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.loop import train
from ling_flow.training.optimizer import build_optimizer, warmup_then_constant
from ling_flow.training.settings import OptimizerSettings
from tests.training.micro import micro_model

SETTINGS = OptimizerSettings(learning_rate=3e-3)


def new_model(**changes):
    model = BailingMoeV2ForCausalLM(micro_model(**changes))
    model.init_weights(seed=0)
    return model


def run(corpus, model=None, steps=4, **options):
    """Train a fresh model; returns it with the reports of its steps."""
    model = model or new_model()
    batches = options.pop("batches", None) or Batches(corpus, {"words": 3, "numbers": 1}, 16, 4, seed=0)
    optimizer = build_optimizer(model, SETTINGS)
    reports = []
    options.setdefault("schedule", warmup_then_constant(SETTINGS.learning_rate, 2))
    train(model, optimizer, batches, steps=steps, on_step=reports.append, **options)
    return model, reports


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one, two):
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_loss_falls(corpus):
    _, reports = run(corpus, steps=40)
    assert reports[0].cross_entropy == pytest.approx(math.log(288), abs=0.2)
    assert reports[-1].cross_entropy < reports[0].cross_entropy - 1.5


def test_report_tells_what_the_step_did(corpus):
    _, reports = run(corpus, steps=3)
    assert [report.step for report in reports] == [1, 2, 3]
    assert [report.learning_rate for report in reports] == [1.5e-3, 3e-3, 3e-3]
    last = reports[-1]
    assert last.tokens == 4 * 16
    assert last.tokens_per_second > 0
    assert last.loss == pytest.approx(last.cross_entropy + 0.1 * last.mtp_cross_entropy, rel=1e-6)
    assert last.gradient_norm > 0
    assert last.load_violation > 0
    assert not last.skipped


def test_two_runs_give_the_same_bits(corpus):
    assert_same_bits(run(corpus)[0], run(corpus)[0])


def test_update_is_clipped_adamw_and_leaves_vectors_undecayed(corpus):
    """The first update, worked out by hand: lr · (sign-like step + decay of matrices)."""
    model = new_model()
    before = weights(model)
    tokens = Batches(corpus, {"words": 1}, 16, 4, seed=0).batch(0).tokens
    model.loss(tokens).loss.backward()
    norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
    gradients = {name: p.grad * min(1.0, 0.5 / norm.item()) for name, p in model.named_parameters()}
    trained, reports = run(
        corpus,
        steps=1,
        schedule=lambda step: 3e-3,
        gradient_clip=0.5,
        batches=Batches(corpus, {"words": 1}, 16, 4, seed=0),
    )
    assert reports[0].gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.5
    for name, parameter in trained.named_parameters():
        decay = 0.1 if parameter.dim() > 1 else 0.0
        step = gradients[name] / (gradients[name].abs() + 1e-8) + decay * before[name]
        torch.testing.assert_close((before[name] - parameter) / 3e-3, step, rtol=1e-3, atol=1e-3)


def test_expert_bias_moves_with_zero_mean_and_counts_start_again(corpus):
    model, _ = run(corpus, steps=3, expert_bias_update_rate=0.01)
    for gate in model.gates():
        assert gate.expert_bias.abs().max() > 0
        assert gate.expert_bias.sum().abs() < 1e-6
        assert gate.expert_counts.sum() == 0
    still, _ = run(corpus, steps=3, expert_bias_update_rate=0.0)
    assert all(not gate.expert_bias.any() for gate in still.gates())


def test_router_losses_are_part_of_the_loss_and_of_the_update(corpus):
    plain, _ = run(corpus, steps=1)
    model, reports = run(corpus, steps=1, router_loss=RouterLoss(balance=0.5))
    tokens_loss = reports[0].cross_entropy + 0.1 * reports[0].mtp_cross_entropy
    assert reports[0].loss > tokens_loss + 0.5 * 0.9 * len(model.gates())  # 1 per router where the load is even
    assert not torch.equal(model.gates()[0].weight, plain.gates()[0].weight)


def test_accumulated_batch_equals_whole_batch(corpus):
    _, one = run(corpus, steps=1)
    _, two = run(corpus, steps=1, sequences_per_forward=3)
    assert two[0].loss == pytest.approx(one[0].loss, rel=1e-6)
    assert two[0].gradient_norm == pytest.approx(one[0].gradient_norm, rel=1e-4)
    assert two[0].load_violation == one[0].load_violation


class Documents:
    """Rows of documents of very unequal length: the shares of next-token and of MTP targets differ from row to row."""

    def batch(self, step):
        tokens = torch.randint(288, (4, 33), generator=torch.Generator().manual_seed(step))
        documents = torch.zeros(4, 33, dtype=torch.int64)
        documents[1:3] = torch.arange(33) // 2
        documents[3, 20:] = -1
        return Batch(tokens, documents, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("router_loss", [None, RouterLoss(balance=0.5, z=0.1)])
def test_parts_of_documents_of_unequal_length_add_up_to_the_whole_batch(corpus, router_loss):
    (whole, one), *parts = (
        run(corpus, steps=1, batches=Documents(), sequences_per_forward=rows, router_loss=router_loss)
        for rows in (None, 1, 2)
    )
    assert one[0].tokens == 4 * 32 - 12  # padding is none
    for model, found in parts:
        for figure in ("loss", "cross_entropy", "mtp_cross_entropy"):
            assert getattr(found[0], figure) == pytest.approx(getattr(one[0], figure), rel=1e-5)
        assert found[0].gradient_norm == pytest.approx(one[0].gradient_norm, rel=1e-4)
        mine, exact = model.model.layers[-1].eh_proj.weight.grad, whole.model.layers[-1].eh_proj.weight.grad
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-6)
        for gate, reference in zip(model.gates(), whole.gates(), strict=True):
            torch.testing.assert_close(gate.weight.grad, reference.weight.grad, rtol=1e-3, atol=1e-6)


def test_a_checkpoint_may_follow_every_step(corpus):
    done = []
    run(corpus, steps=3, checkpoint=done.append)
    assert done == [1, 2, 3]


def test_a_stage_draws_its_own_batches_from_zero(corpus):
    asked = []

    class Recorder:
        def __init__(self):
            self.batches = Batches(corpus, {"words": 1}, 16, 4, seed=0)

        def batch(self, step):
            asked.append(step)
            return self.batches.batch(step)

    _, reports = run(corpus, start_step=12, steps=14, first_batch_step=10, batches=Recorder())
    assert asked == [2, 3]
    assert [report.step for report in reports] == [13, 14]
    assert reports[0].learning_rate == SETTINGS.learning_rate  # warm-up is over


class Poisoned:
    """Batches whose loss is not finite at some steps: the model's weight is made infinite while they are drawn."""

    def __init__(self, corpus, model, bad):
        self.batches, self.model, self.bad = Batches(corpus, {"words": 1}, 16, 4, seed=0), model, bad
        self.good_value = model.model.norm.weight[0].item()
        self.poisoned = False

    def batch(self, step):
        weight = self.model.model.norm.weight.data
        if self.poisoned:
            weight[0] = self.good_value
        self.poisoned = step in self.bad
        if self.poisoned:
            self.good_value = weight[0].item()
            weight[0] = float("nan")
        return self.batches.batch(step)


def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(corpus):
    model = new_model()
    _, reports = run(corpus, model, steps=3, batches=Poisoned(corpus, model, {1}))
    assert [report.skipped for report in reports] == [False, True, False]
    assert not math.isfinite(reports[1].loss)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_counts_of_a_skipped_batch_are_forgotten(corpus):
    model = new_model()
    _, reports = run(corpus, model, steps=3, batches=Poisoned(corpus, model, {2}))
    assert reports[-1].skipped
    assert reports[-1].load_violation > 0
    assert all(gate.expert_counts.sum() == 0 for gate in model.gates())


def test_several_steps_in_a_row_that_are_not_finite_end_the_run(corpus):
    model = new_model()
    bad = set(range(2, 7))
    with pytest.raises(SystemFault, match=f"step {1 + max(bad)}: loss .* not finite or a spike for 5 steps in a row"):
        run(corpus, model, steps=20, batches=Poisoned(corpus, model, bad))


def test_without_a_checkpoint_to_go_back_to_the_run_ends(corpus):
    model = new_model()
    asked = []
    with pytest.raises(SystemFault, match="5 steps in a row"):
        run(
            corpus,
            model,
            steps=20,
            batches=Poisoned(corpus, model, set(range(2, 7))),
            roll_back=lambda: asked.append(1),
        )
    assert asked == [1]


def test_losses_are_told_per_source(corpus):
    model = new_model()
    batches = Batches(corpus, {"words": 3, "numbers": 1}, 16, 4, seed=0)
    batch = batches.batch(0)
    expected = {
        source: model.loss(batch.tokens[batch.sources == source]).cross_entropy.item()
        for source in batch.sources.unique().tolist()
    }
    _, reports = run(corpus, model, steps=1, sequences_per_forward=3)
    assert reports[0].source_cross_entropy == pytest.approx(expected, rel=1e-5)
    assert set(reports[0].source_cross_entropy) == {0, 1}


def test_masked_rows_in_parts_give_the_loss_of_the_whole(corpus):
    for packing in ("masked_stream", "best_fit"):
        batches = Batches(corpus, {"words": 1}, 24, 6, seed=0, packing=packing)
        whole, parts = (run(corpus, steps=2, batches=batches, sequences_per_forward=rows)[1] for rows in (None, 4))
        for one, other in zip(whole, parts, strict=True):
            assert one.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-5)


def test_schedule_warms_up_once_and_then_stays():
    schedule = warmup_then_constant(1e-3, 4)
    assert [schedule(step) for step in (0, 1, 3, 4, 10**6)] == [0.25e-3, 0.5e-3, 1e-3, 1e-3, 1e-3]
    assert warmup_then_constant(1e-3, 0)(0) == 1e-3
