"""The loss curve of preset `tiny`, kept in a file: nothing changes the numbers unnoticed, nor does a second worker.

    python -m tests.training.test_golden            # writes the files again, after a change that is meant

In float64: in float32 another processor's matrix products round otherwise, and where a token's experts are nearly tied
it goes to another one, which moved a loss by 0.1 % after seven steps. Losses are told in float32.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from ling_flow.data.batches import Batch
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.loop import StepReport, train
from ling_flow.training.optimizer import build_optimizer, warmup_then_constant
from ling_flow.training.settings import OptimizerSettings

FOLDER = Path(__file__).parent / "golden"
SEEDS = (0, 1, 2)
STEPS = 16


class Walks:
    """Random walks over the vocabulary: something to learn, with no file to read."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        start_B1 = torch.randint(1024, (6, 1), generator=generator)
        steps_BS = torch.randint(1, 4, (6, 96), generator=generator)
        tokens = (start_B1 + steps_BS.cumsum(1)) % 1024
        return Batch(tokens, None, torch.tensor([0, 0, 1, 1, 2, 0]))


def curve(seed: int) -> list[StepReport]:
    torch.set_num_threads(1)
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(seed)
    model.double()
    settings = OptimizerSettings(learning_rate=2e-3)
    reports: list[StepReport] = []
    train(
        model, build_optimizer(model, settings), Walks(seed), steps=STEPS, schedule=warmup_then_constant(2e-3, 4),
        expert_bias_update_rate=1e-2, on_step=reports.append,
    )  # fmt: skip
    return reports


def golden(seed: int) -> list[float]:
    found: list[float] = json.loads((FOLDER / f"tiny-seed{seed}.json").read_text())
    return found


def one_worker(rank: int, workers: int, store: str, results: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    reports = curve(0)
    Path(f"{results}-{rank}.json").write_text(
        json.dumps(
            [[report.loss, report.gradient_norm, sorted(report.source_cross_entropy.items())] for report in reports]
        )
    )
    distributed.destroy_process_group()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_curve_is_the_one_on_file(seed: int) -> None:
    assert [report.loss for report in curve(seed)] == pytest.approx(golden(seed), rel=1e-6)


@pytest.mark.parametrize("workers", [2])
def test_more_workers_train_the_same(workers: int, tmp_path: Path) -> None:
    multiprocessing.spawn(one_worker, (workers, str(tmp_path / "store"), str(tmp_path / "found")), nprocs=workers)
    alone = curve(0)
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(workers)]
    assert all(other == found[0] for other in found)  # every worker tells the same
    for report, (loss, norm, by_source) in zip(alone, found[0], strict=True):
        assert loss == pytest.approx(report.loss, rel=1e-5)
        assert norm == pytest.approx(report.gradient_norm, rel=1e-3)
        assert dict(by_source) == pytest.approx(report.source_cross_entropy, rel=1e-4)


if __name__ == "__main__":
    for number in SEEDS:
        text = json.dumps([report.loss for report in curve(number)], indent=0)
        (FOLDER / f"tiny-seed{number}.json").write_text(text + "\n")
