"""Balancing without an auxiliary loss (Ling 2.0 §2.2): over several ranks, and over a run."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from ling_flow.data.batches import Batch
from ling_flow.model.presets import tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.loop import train
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import OptimizerSettings


def biases_after_a_batch(rows: Tensor) -> list[Tensor]:
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(0)
    model.loss(rows)
    model.update_expert_bias(0.01)
    return [gate.expert_bias for gate in model.gates()]


def rows() -> Tensor:
    return torch.randint(1000, (4, 33), generator=torch.Generator().manual_seed(0))


def one_rank(rank: int, store: str, results: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(biases_after_a_batch(rows()[2 * rank : 2 * rank + 2]), f"{results}-{rank}")
    distributed.destroy_process_group()


def test_counts_are_summed_over_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, (str(tmp_path / "store"), str(tmp_path / "biases")), nprocs=2)
    expected = biases_after_a_batch(rows())
    for rank in range(2):
        found = torch.load(tmp_path / f"biases-{rank}", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    alone = biases_after_a_batch(rows()[:2])
    assert not all(torch.equal(a, b) for a, b in zip(alone, expected, strict=True))


class SourceCode:
    """Python's standard library, a byte a token."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        self.bytes = np.frombuffer(b"".join(path.read_bytes() for path in files)[:2_000_000], dtype=np.uint8)

    def batch(self, step: int) -> Batch:
        starts = np.random.default_rng((0, step)).integers(len(self.bytes) - 129, size=2)
        return Batch(torch.from_numpy(np.stack([self.bytes[s : s + 129] for s in starts]).astype(np.int64)))


def loads_of_a_run(bias_rate: float, steps: int, window: int) -> Tensor:
    """Largest load over the even one, per window of steps and layer."""
    model = BailingMoeV2ForCausalLM(tiny())
    model.init_weights(0)
    update, windows = model.update_expert_bias, []
    counts_NE = torch.zeros(len(model.gates()), model.config.num_experts)
    done = 0

    def watched(rate: float) -> float:
        nonlocal counts_NE, done
        counts_NE = counts_NE + torch.stack([gate.expert_counts for gate in model.gates()])
        done += 1
        if done % window == 0:
            windows.append(counts_NE.amax(1) / counts_NE.mean(1))
            counts_NE = torch.zeros_like(counts_NE)
        return update(rate)

    model.update_expert_bias = watched  # type: ignore[method-assign]
    train(
        model,
        build_optimizer(model, OptimizerSettings(learning_rate=1e-3)),
        SourceCode(),
        steps=steps,
        schedule=lambda step: 1e-3 * min(1.0, (step + 1) / 50),
        expert_bias_update_rate=bias_rate,
    )
    return torch.stack(windows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bias_keeps_every_expert_within_a_quarter_of_even_for_2000_steps() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with_bias, without = loads_of_a_run(1e-2, 2000, 100), loads_of_a_run(0.0, 300, 100)
    finally:
        torch.set_num_threads(threads)
    assert with_bias[1:].max() < 1.25  # the first hundred steps are what the bias has to find
    assert without[1:].min() > 1.25
