"""A stage under several workers: one writes, and any number of them goes on from what is there."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from ling_flow.data.batches import Batches
from ling_flow.data.corpus import Corpus
from ling_flow.errors import SystemFault
from ling_flow.model.hf import load_pretrained
from ling_flow.training.checkpoint import list_checkpoints
from ling_flow.training.retention import Retention
from ling_flow.training.stage import batch_sizes, open_stage, run_stage
from tests.training.micro import micro_model, stage_settings

pytestmark = pytest.mark.slow

SETTINGS = stage_settings(steps=8, checkpoints_saved=4, retention=Retention(window=2))


def worker(rank: int, workers: int, store: str, corpus: Path, directory: Path, stop_after: int | None) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    opened = Corpus.open(corpus)
    run = open_stage(
        directory, SETTINGS, micro_model(), seed=0, previous=None, device=torch.device("cpu"), log=lambda line: None
    )
    batches = Batches(opened, {"words": 1}, SETTINGS.sequence_length, batch_sizes(SETTINGS), 0)
    steps: list[int] = []

    def stop() -> bool:
        return rank == workers - 1 and steps[-1] == stop_after  # only one of them is told

    options = {"tokenizer_dir": opened.path / "tokenizer", "on_step": lambda report: steps.append(report.step)}
    if stop_after is None:
        kept = run_stage(run, directory, batches, SETTINGS, stop=stop, **options)
        assert [entry.step for entry in kept.window] == [6, 8]
    else:
        with pytest.raises(SystemFault, match=f"saved at step {stop_after} of 8"):
            run_stage(run, directory, batches, SETTINGS, stop=stop, **options)
    distributed.destroy_process_group()


def train(workers, store, corpus, directory, stop_after=None):
    directory.mkdir(exist_ok=True)
    arguments = (workers, str(store / f"{directory.name}-{workers}-{stop_after}"), corpus.path, directory, stop_after)
    multiprocessing.spawn(worker, arguments, nprocs=workers)


def test_another_number_of_workers_goes_on(corpus, tmp_path):
    """Stopped at a step that was not planned. The same number goes on bit for bit, another up to the order of sums."""
    store = tmp_path / "store"
    store.mkdir()
    train(2, store, corpus, tmp_path / "two")
    for after in (2, 1):
        directory = tmp_path / f"two_then_{after}"
        train(2, store, corpus, directory, stop_after=3)
        assert [path.name for path in list_checkpoints(directory)] == ["step-00000002", "step-00000003"]
        train(after, store, corpus, directory)
        names = sorted(path.name for path in directory.iterdir())
        assert names == ["step-00000006", "step-00000008"]
        whole, resumed = (
            load_pretrained(path / "step-00000008").state_dict() for path in (tmp_path / "two", directory)
        )
        for name, tensor in whole.items():
            if after == 2:
                assert torch.equal(resumed[name], tensor), name
            else:
                torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
