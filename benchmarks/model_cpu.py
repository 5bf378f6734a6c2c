"""Speed of a small model on a CPU: training steps (forward, backward, clipping, AdamW, bias update) and batched
decoding.

    python benchmarks/model_cpu.py --preset tiny --threads 2 --set hidden_size=128

Prints the best of several rounds, since other work on the machine only ever makes a round slower.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: threads that spin ruin each other where cores are shared

import torch

from ling_flow.config import parse, parse_overrides
from ling_flow.generation.engine import generate
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.model.presets import model_preset
from ling_flow.model.transformer import BailingMoeV2ForCausalLM


def best_seconds(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of `rounds` runs, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the architecture"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16, help="sequences per step and per decoding batch / 8")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence; half of it prompt when decoding")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changes = parse_overrides(options.set)
    config = parse(ModelConfig, {**model_preset(options.preset).model_dump(), **changes}, "model")
    model = BailingMoeV2ForCausalLM(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    tokens_BS1 = torch.randint(config.vocab_size, (options.sequences, options.length + 1), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        model.loss(tokens_BS1).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_expert_bias(1e-3)

    counts = config.parameter_counts()
    flops = training_flops_per_token(config, options.length).total
    trained = options.sequences * options.length / best_seconds(step, options.rounds)
    half = options.length // 2
    prompts = tokens_BS1[:, :half].repeat(8, 1).tolist()
    decoded = (
        len(prompts)
        * half
        / best_seconds(lambda: generate(model, prompts, half, 1.0, set(), 0), max(2, options.rounds // 5))
    )
    print(
        f"parameters {counts.total + counts.mtp:,}, active {counts.active:,}, {flops / 1e6:.2f} MFLOP per trained token"
    )
    print(
        f"training {trained:,.0f} tokens/s ({trained * flops / 1e9:.0f} GFLOP/s), decoding {decoded:,.0f} tokens/s, "
        f"{options.threads} threads"
    )


if __name__ == "__main__":
    main()
