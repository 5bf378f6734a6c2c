"""What befalls a training process, in a plain process: after each fault the same command ends with the same bits."""

import random
import shutil
import signal
import subprocess

import pytest

from ling_flow.errors import SystemFault
from ling_flow.training.checkpoint import list_checkpoints, verify_checkpoint
from ling_flow.training.retention import Retention
from tests.training.micro import stage_settings
from tests.training.trainer import Fault, train_apart

pytestmark = pytest.mark.slow

KILLS = 24
LONG = stage_settings(steps=300, checkpoints_saved=100, retention=Retention(window=2))  # a save every 3 steps
SHORT = LONG.model_copy(update={"steps": 24, "checkpoints_saved": 6})  # every 4


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The stage of some settings, trained without a fault."""
    made = {}

    def train(settings):
        if settings.steps not in made:
            directory = made[settings.steps] = tmp_path_factory.mktemp("whole")
            assert train_apart(corpus.path, directory, settings).exitcode == 0
        return made[settings.steps]

    return train


def assert_same_checkpoints(one, other):
    """Weights of all that was kept, and the moments of the newest."""
    names = [path.name for path in list_checkpoints(one)]
    assert names == [path.name for path in list_checkpoints(other)]
    files = [f"{name}/model.safetensors" for name in names] + [f"{names[-1]}/training_state/optimizer.safetensors"]
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert sorted(path.name for path in other.iterdir()) == names


def test_killed_again_and_again_a_run_ends_with_the_same_bits(corpus, whole, tmp_path):
    draw = random.Random(0)
    while_saving, resumed = 0, set()
    for _ in range(KILLS):
        fault = Fault(draw.randint(1, 12), draw.uniform(0, 0.05), signal.SIGKILL)
        end = train_apart(corpus.path, tmp_path, LONG, fault)
        assert end.exitcode == -signal.SIGKILL
        assert not any("damaged" in line for line in end.lines)
        resumed.update(line for line in end.lines if "resumed at step" in line)
        while_saving += any(tmp_path.glob(".step-*"))  # half-written, or half-removed
    assert while_saving >= 3
    assert len(resumed) >= KILLS // 2  # it got on in between
    end = train_apart(corpus.path, tmp_path, LONG)
    assert end.exitcode == 0, end.error
    assert end.steps < LONG.steps
    assert_same_checkpoints(whole(LONG), tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_told_in_one_line_and_spoils_nothing(corpus, whole, small_disk):
    size = sum(path.stat().st_size for path in list_checkpoints(whole(SHORT))[-1].rglob("*"))
    directory, filler = small_disk / "checkpoints", small_disk / "filler"
    directory.mkdir()
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - size * 5 // 2))  # two checkpoints and a half fit
    end = train_apart(corpus.path, directory, SHORT)
    assert end.exitcode == SystemFault.exit_code
    assert "step-00000012: cannot be written (No space left on device)" in end.error
    assert len(end.error.splitlines()) == 1
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000004", "step-00000008"]
    for path in list_checkpoints(directory):
        verify_checkpoint(path)
    filler.unlink()
    end = train_apart(corpus.path, directory, SHORT)
    assert end.exitcode == 0, end.error
    assert end.steps == 16
    assert_same_checkpoints(whole(SHORT), directory)


@pytest.mark.parametrize("file", ["model.safetensors", "training_state/optimizer.safetensors"])
def test_a_file_that_may_not_grow_is_told_and_spoils_nothing(corpus, whole, tmp_path, file):
    limit = (list_checkpoints(whole(SHORT))[-1] / file).stat().st_size - 1
    end = train_apart(corpus.path, tmp_path, SHORT, Fault(steps=10, file_bytes=limit, saved=2))
    assert end.exitcode == SystemFault.exit_code
    assert "step-00000012: cannot be written (File too large)" in end.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008"]
    end = train_apart(corpus.path, tmp_path, SHORT)
    assert (end.exitcode, end.steps) == (0, 16)
    assert_same_checkpoints(whole(SHORT), tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "remove"])
@pytest.mark.parametrize("file", ["model.safetensors", "training_state/optimizer.safetensors"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(corpus, whole, tmp_path, damage, file):
    train_apart(corpus.path, tmp_path, SHORT, Fault(steps=15, signal=signal.SIGTERM))
    before, newest = list_checkpoints(tmp_path)[-2:]
    assert (before.name, newest.name) == ("step-00000012", "step-00000015")
    damage(newest / file)
    end = train_apart(corpus.path, tmp_path, SHORT)
    assert end.exitcode == 0, end.error
    assert end.lines[0].startswith(f"checkpoint skipped: {newest / file}: ")
    assert end.lines[1] == "resumed at step 12 of 24"
    assert_same_checkpoints(whole(SHORT), tmp_path)


@pytest.mark.parametrize("steps", [1, 6, 8, 24])
def test_sigterm_saves_and_leaves_for_another_try(corpus, whole, tmp_path, steps):
    end = train_apart(corpus.path, tmp_path, SHORT, Fault(steps=steps, signal=signal.SIGTERM))
    assert end.exitcode == SystemFault.exit_code
    assert f"told to stop: short is saved at step {steps} of 24; run again" in end.error
    assert list_checkpoints(tmp_path)[-1].name == f"step-{steps:08d}"
    end = train_apart(corpus.path, tmp_path, SHORT)
    assert (end.exitcode, end.steps) == (0, 24 - steps)
    assert_same_checkpoints(whole(SHORT), tmp_path)
