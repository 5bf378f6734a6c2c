"""Our training loop on a CPU beside a plain torch loop and transformers' Trainer: same sizes, data and optimizer.

    python benchmarks/train_cpu.py                                  # three shapes, float32, 2 threads
    python benchmarks/train_cpu.py --shapes D128-E32-K4-I64 --json figures.json

Ours is the loop of pre-training with all it does in a step: loss per source, clipping, the guard against spikes, moving
the experts' biases, reports. The others train transformers' Qwen3-MoE of the same layers, heads, experts and vocabulary
with the faster of its two ways of running experts: `plain` in a loop of a few lines (forward, backward, clip, step),
`Trainer` by transformers.Trainer without evaluation, saving or logging (left out where `accelerate` is missing). All
use torch's fused AdamW with the same settings, the same rows of 512 tokens, and run in turn, round after round; the
figures are medians. A ratio above 1 means that ours is faster than the better peer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.model_cpu import LENGTH, SHAPES, VOCABULARY, in_turn, our_model, their_model
from ling_flow.data.batches import Batch
from ling_flow.training.loop import train
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import OptimizerSettings

SEQUENCES, STEPS = 8, 4  # of a round
SETTINGS = OptimizerSettings(learning_rate=1e-4)


class Rows:
    """Random tokens, the same for every side."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(VOCABULARY, (STEPS, SEQUENCES, LENGTH + 1), generator=generator)

    def batch(self, step: int) -> Batch:
        return Batch(self.rows[step % STEPS], None, torch.zeros(SEQUENCES, dtype=torch.int64))


def ours(sizes: dict[str, int]) -> Callable[[], None]:
    model = our_model(sizes, "float32")
    optimizer = build_optimizer(model, SETTINGS)
    return lambda: train(model, optimizer, Rows(), steps=STEPS, schedule=lambda step: 1e-4, on_step=lambda report: None)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def plain(sizes: dict[str, int], experts: str) -> Callable[[], None]:
    model = their_model(sizes, "float32", experts).train()
    optimizer, rows = adamw(model), Rows().rows

    def run() -> None:
        for tokens in rows:
            optimizer.zero_grad()
            model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return run


class _Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.rows = Rows().rows.flatten(0, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[at, :-1], "labels": self.rows[at, :-1]}


def trainer(sizes: dict[str, int], experts: str) -> Callable[[], None]:
    from transformers import Trainer, TrainingArguments

    model = their_model(sizes, "float32", experts)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=SEQUENCES, max_steps=STEPS, learning_rate=1e-4,
        adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="constant", save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, optim="adamw_torch_fused",
    )  # fmt: skip

    def run() -> None:
        Trainer(model=model, args=arguments, train_dataset=_Examples()).train()

    return run


def compare(shape: str, rounds: int) -> dict[str, Any]:
    sizes = {name: int(value) for name, value in re.findall(r"([DEKI])(\d+)", shape)}
    runs = {"ours": ours(sizes)}
    for experts in ("eager", "grouped_mm"):
        runs[f"plain, {experts}"] = plain(sizes, experts)
        try:
            runs[f"Trainer, {experts}"] = trainer(sizes, experts)
        except ImportError:
            continue
    tokens = STEPS * SEQUENCES * LENGTH
    speeds = {name: tokens / seconds for name, seconds in in_turn(runs, rounds).items()}
    best = max(speed for name, speed in speeds.items() if name != "ours")
    return {"shape": shape, "tokens_per_second": speeds, "ratio": speeds["ours"] / best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="D hidden, E experts, K chosen, I expert width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for shape in options.shapes:
        found = compare(shape, options.rounds)
        results.append(found)
        speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in found["tokens_per_second"].items())
        print(f"{shape:18} {speeds} tokens/s; ratio to the better peer {found['ratio']:.2f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"threads": options.threads, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
