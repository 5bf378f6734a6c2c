"""Spikes are not trained on; a run that meets too many goes back to its last good checkpoint and passes them over."""

import contextlib

import pytest
import torch

from ling_flow.data.batches import Batch, Batches
from ling_flow.errors import SystemFault
from ling_flow.training.guard import GuardSettings, GuardState, Running, SpikeGuard
from ling_flow.training.interval import SaveClock
from ling_flow.training.settings import BatchRamp
from ling_flow.training.stage import batch_sizes, open_stage, run_stage
from tests.training.micro import micro_model, stage_settings

CPU = torch.device("cpu")


def test_running_mean_and_variance_are_those_of_the_values_until_the_history_is_full() -> None:
    values, running = [3.0, 5.0, 4.0, 8.0], Running()
    for value in values:
        running = running.updated(value, history=10)
    assert running.mean == pytest.approx(5.0)
    assert running.variance == pytest.approx(sum((value - 5) ** 2 for value in values) / 4)


def test_spikes_are_told_from_noise_and_not_learnt_from() -> None:
    guard = SpikeGuard(GuardSettings(history=20))
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    assert all(guard.takes(3 - at / 400 + 0.1 * value, 1 + 0.2 * value) for at, value in enumerate(noise))
    before = guard.state.loss
    assert not guard.takes(4.0, 1.0)
    assert not guard.takes(2.0, 9.0)
    assert not guard.takes(float("nan"), 1.0)
    assert guard.takes(0.5, 0.1)  # far below the mean is no spike
    assert guard.state.loss.count == before.count + 1
    assert guard.state.skipped_in_a_row == 0


def test_early_steps_are_taken_whatever_they_are() -> None:
    guard = SpikeGuard(GuardSettings(history=20))
    assert all(guard.takes(loss, 1.0) for loss in (9.0, 1.0, 30.0, 2.0))
    plain = SpikeGuard(GuardSettings(factor=None, history=2))
    assert all(plain.takes(loss, 1.0) for loss in (1.0, 1.0, 1.0, 1e9))


def test_state_goes_through_json_to_the_bit() -> None:
    guard = SpikeGuard(GuardSettings(history=3))
    for loss in (3.1, 2.9, 3.3, 2.7):
        guard.takes(loss, loss / 7)
    assert GuardState.model_validate_json(guard.state.model_dump_json()) == guard.state


POISON = 287  # a token that no text has; its embedding is infinite in these runs


class Spoilt(Batches):
    """Batches of which some hold the poisonous token."""

    spoilt: frozenset[int] = frozenset()

    def batch(self, step: int) -> Batch:
        self.asked.append(step)
        batch = super().batch(step)
        if step not in self.spoilt:
            return batch
        tokens = batch.tokens.clone()
        tokens[0, 3] = POISON
        return batch._replace(tokens=tokens)


SETTINGS = stage_settings(
    steps=24, checkpoints_saved=6, guard=GuardSettings(factor=None, skips_in_a_row=2, rollbacks=1)
)


def run(corpus, directory, spoilt, stop_after=None, settings=SETTINGS):
    """A stage whose batches `spoilt` have no finite loss; returns it, its reports, batches asked for, and its log."""
    directory.mkdir(exist_ok=True)
    lines, reports = [], []
    stage = open_stage(directory, settings, micro_model(), seed=0, previous=None, device=CPU, log=lines.append)
    with torch.no_grad():
        stage.model.model.word_embeddings.weight[POISON] = torch.inf
    batches = Spoilt(corpus, {"words": 1}, 16, batch_sizes(settings), 0, drawn_before=stage.state.drawn_before)
    batches.spoilt, batches.asked = frozenset(spoilt), []

    def on_step(report):
        reports.append(report)
        if stop_after is not None and len(reports) == stop_after:
            raise KeyboardInterrupt

    tokenizer = corpus.path / "tokenizer"
    with contextlib.suppress(KeyboardInterrupt):
        stage.kept = run_stage(
            stage, directory, batches, settings, tokenizer_dir=tokenizer, on_step=on_step, log=lines.append
        )
    return stage, reports, batches.asked, lines


def test_one_bad_batch_is_skipped(corpus, tmp_path):
    stage, reports, asked, _ = run(corpus, tmp_path / "a", {14})
    assert [report.step for report in reports if report.skipped] == [15]
    assert asked == list(range(24))
    assert (stage.state.skipped_steps, stage.state.guard.rollbacks) == (1, 0)


def test_bad_batches_in_a_row_are_passed_over_from_the_last_checkpoint(corpus, tmp_path):
    stage, reports, asked, lines = run(corpus, tmp_path / "a", {13, 14})
    # Skipped at 13 and 14, back to the checkpoint of 12 steps, on with batch 15.
    assert asked == [*range(15), *range(15, 27)]
    assert [report.step for report in reports] == [*range(1, 16), *range(13, 25)]
    assert any("rolled back from step 15 to 12" in line for line in lines)
    assert (stage.state.step, stage.state.guard.rollbacks, stage.state.guard.batches_passed) == (24, 1, 3)
    assert sum(drawn.tokens for drawn in stage.state.drawn.values()) >= 27 * 4 * 16


def test_tokens_of_growing_batches_are_those_that_were_read(corpus, tmp_path):
    ramp = SETTINGS.model_copy(update={"batch_ramp": BatchRamp(sequences_at_start=1, steps=24)})
    stage, _, asked, _ = run(corpus, tmp_path / "a", {13, 14}, settings=ramp)
    sizes = batch_sizes(ramp)
    counted = [*range(12), *asked[15:]]
    assert stage.state.tokens == 16 * sum(sizes.of(step) for step in counted)
    index = {entry.step: entry.tokens for entry in stage.kept.window + stage.kept.milestones}
    assert index == {step: 16 * sum(sizes.of(at) for at in counted[:step]) for step in index}
    assert max(index) == 24 and len(index) > 1


def test_a_kill_after_a_rollback_changes_nothing(corpus, tmp_path):
    whole, _, _, _ = run(corpus, tmp_path / "whole", {13, 14})
    run(corpus, tmp_path / "killed", {13, 14}, stop_after=24)
    again, _, asked, _ = run(corpus, tmp_path / "killed", {13, 14})
    assert asked[0] == 23  # 20 steps were saved, 3 batches passed over
    assert again.state.guard == whole.state.guard
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_a_rollback_goes_to_a_planned_checkpoint(corpus, tmp_path, monkeypatch):
    """One that was saved beside the plan is newer, but it depends on the time of day."""
    whole, _, _, _ = run(corpus, tmp_path / "whole", {13, 14})
    monkeypatch.setattr(SaveClock, "due", lambda self: True)  # after every step
    again, _, asked, lines = run(corpus, tmp_path / "again", {13, 14})
    assert asked == [*range(15), *range(15, 27)]
    assert any("rolled back from step 15 to 12" in line for line in lines)
    assert again.state.guard == whole.state.guard
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_many_steps_that_are_skipped_one_by_one_end_the_run_too(corpus, tmp_path):
    often = SETTINGS.model_copy(update={"guard": GuardSettings(factor=None, history=6, rollbacks=1)})
    with pytest.raises(SystemFault, match=r"was not finite or a spike in \d\d% of the last 6 steps"):
        run(corpus, tmp_path / "a", range(0, 40, 2), settings=often)


def test_what_a_rollback_undoes_stays_counted(corpus, tmp_path):
    stage, reports, _, _ = run(corpus, tmp_path / "a", {5, 13, 14})
    assert stage.state.guard.rollbacks == 1
    assert stage.state.skipped_steps == sum(report.skipped for report in reports) == 3
    assert stage.state.seconds == pytest.approx(sum(report.seconds for report in reports))


def test_rollbacks_have_a_limit(corpus, tmp_path):
    with pytest.raises(SystemFault, match="was not finite or a spike for 2 steps in a row"):
        run(corpus, tmp_path / "a", {13, 14, 16, 17})
