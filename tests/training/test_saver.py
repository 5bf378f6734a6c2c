import threading

import pytest
import torch

from ling_flow.errors import SystemFault
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.checkpoint import contents_of, save_checkpoint
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.saver import Saver
from ling_flow.training.settings import TrainingState
from tests.training.micro import micro_model, stage_settings

SETTINGS = stage_settings()


def state_at(step):
    return TrainingState(
        stage="short", step=step, stage_start=0, tokens=0, tokens_before=0, skipped_steps=0, seconds=0,
        load_violation=0, settings=SETTINGS, drawn_before={}, drawn={},
    )  # fmt: skip


@pytest.fixture(params=["adamw", "adamw8bit", "muon"])
def trained(request):
    model = BailingMoeV2ForCausalLM(micro_model(hidden_size=64))
    model.init_weights(seed=0)
    optimizer = build_optimizer(model, SETTINGS.optimizer.model_copy(update={"optimizer": request.param}))
    update(model, optimizer)
    return model, optimizer


def update(model, optimizer):
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter)
    optimizer.step()


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_is_written_behind_training_is_what_training_had(trained, tmp_path):
    """Also where weights and moments change before a byte is written, and at the second save with the same buffers."""
    go = threading.Event()
    written = []

    def write(contents):
        assert go.wait(60)
        written.append(save_checkpoint(tmp_path / "behind", contents))

    with Saver(write, lambda report: None) as saver:
        for step in (1, 2):
            save_checkpoint(tmp_path / "at_once", contents_of(*trained, state_at(step)))
            saver.save(contents_of(*trained, state_at(step)))
            update(*trained)
            assert len(written) == step - 1
            go.set()
            saver.wait()
            go.clear()
    for step in ("step-00000001", "step-00000002"):
        assert files(tmp_path / "behind" / step) == files(tmp_path / "at_once" / step)
    weights = [files(tmp_path / "behind" / step)["model.safetensors"] for step in ("step-00000001", "step-00000002")]
    assert weights[0] != weights[1]


def test_one_checkpoint_is_written_at_a_time_and_leaving_waits(trained):
    go, writing, reports = threading.Event(), [], []

    def write(contents):
        writing.append(contents.state.step)
        assert go.wait(60)

    with Saver(write, reports.append) as saver:
        saver.save(contents_of(*trained, state_at(1)))
        saver.collect()
        assert reports == []
        threading.Timer(0.05, go.set).start()
        saver.save(contents_of(*trained, state_at(2)))  # waits for the first
        assert [report.step for report in reports] == [1]
    assert [report.step for report in reports] == writing == [1, 2]
    assert all(report.stall_seconds > 0 and report.seconds > 0 for report in reports)


@pytest.mark.parametrize("then", ["save", "wait", "leave"])
def test_an_error_while_writing_surfaces_in_training(trained, then):
    def write(contents):
        raise SystemFault(f"step {contents.state.step}: no space")

    contents = contents_of(*trained, state_at(1))
    with pytest.raises(SystemFault, match="step 1: no space"), Saver(write, lambda report: None) as saver:
        saver.save(contents)
        if then == "save":
            saver.save(contents)
            pytest.fail("the error is older than the second checkpoint")
        if then == "wait":
            saver.wait()
            pytest.fail("the error is known")


def test_an_error_in_training_is_the_one_that_is_told(trained):
    def write(contents):
        raise SystemFault("no space")

    with pytest.raises(ValueError, match="in training"), Saver(write, lambda report: None) as saver:
        saver.save(contents_of(*trained, state_at(1)))
        raise ValueError("in training")
