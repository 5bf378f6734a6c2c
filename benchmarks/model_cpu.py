"""Our model on a CPU beside transformers' Qwen3-MoE of the same sizes: training step, batched decoding, expert GEMMs.

    python benchmarks/model_cpu.py                    # all shapes, float32 and bfloat16, 2 threads
    python benchmarks/model_cpu.py --shapes D128-E32-K4-I64 --types float32 --json figures.json

Both sides have the same layers, heads, experts and vocabulary, no shared expert and no multi-token prediction, the same
number of tokens and threads, and run in turn in one process, round after round; each figure is the median of its
rounds. `eager` and `grouped_mm` are transformers' own ways of running the experts. Ratios above 1 mean that ours is
faster. The GEMM line holds one layer's expert matrix products (forward and both gradients) against plain matrix
products of the same FLOPs: what routing costs the arithmetic itself.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ling_flow.generation.engine import generate
from ling_flow.kernels.experts import Rows, routed_experts
from ling_flow.model.config import ModelConfig
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

SHAPES = ("D128-E32-K4-I64", "D256-E64-K8-I64", "D512-E256-K8-I64")
LAYERS, VOCABULARY, HEAD_DIM = 2, 2048, 32
SEQUENCES, LENGTH = 16, 512  # 8,192 tokens a training step
PROMPTS, PROMPT, ANSWER = 32, 64, 64  # of decoding


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run; one round to warm up, then all of them in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def our_model(sizes: Mapping[str, int], dtype: str) -> BailingMoeV2ForCausalLM:
    heads = sizes["D"] // HEAD_DIM
    model = BailingMoeV2ForCausalLM(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=sizes["D"],
            intermediate_size=sizes["D"],
            moe_intermediate_size=sizes["I"],
            num_hidden_layers=LAYERS,
            first_k_dense_replace=0,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=HEAD_DIM,
            num_experts=sizes["E"],
            num_experts_per_tok=sizes["K"],
            num_shared_experts=0,
            num_nextn_predict_layers=0,
            partial_rotary_factor=1.0,
            max_position_embeddings=LENGTH,
            initializer_range=0.02,
            torch_dtype=dtype,
        )
    )
    model.init_weights(0)
    return model


def their_model(sizes: Mapping[str, int], dtype: str, experts: str) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    heads = sizes["D"] // HEAD_DIM
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes["D"],
        moe_intermediate_size=sizes["I"],
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD_DIM,
        num_experts=sizes["E"],
        num_experts_per_tok=sizes["K"],
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        use_cache=True,
    )
    config._experts_implementation = experts
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype))
    assert model.config._experts_implementation == experts
    return model


def expert_gemms(sizes: Mapping[str, int], dtype: str, rounds: int) -> dict[str, float]:
    """One layer's routed experts, forward and backward: whole operation, its matrix products alone, dense products."""
    kind = getattr(torch, dtype)
    tokens, rows = SEQUENCES * LENGTH, SEQUENCES * LENGTH * sizes["K"]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    x_TD = random(tokens, sizes["D"]).requires_grad_()
    gate_up = random(sizes["E"], 2 * sizes["I"], sizes["D"]).requires_grad_()
    down = random(sizes["E"], sizes["D"], sizes["I"]).requires_grad_()
    indices = torch.rand(tokens, sizes["E"], generator=generator).topk(sizes["K"]).indices
    weights = torch.rand(tokens, sizes["K"], generator=generator).requires_grad_()
    counts = torch.bincount(indices.flatten(), minlength=sizes["E"])
    upstream = random(tokens, sizes["D"])
    sides = {"in": random(rows, sizes["D"]), "hidden": random(rows, sizes["I"]), "mid": random(rows, 2 * sizes["I"])}
    dense_up, dense_down = random(sizes["D"], 2 * sizes["I"]), random(sizes["I"], sizes["D"])

    def whole() -> None:
        for leaf in (x_TD, gate_up, down, weights):
            leaf.grad = None
        routed_experts(x_TD, indices, weights, counts, gate_up, down).backward(upstream)

    def dense() -> None:
        up, out = sides["in"] @ dense_up, sides["hidden"] @ dense_down
        _ = up @ dense_up.T, sides["in"].T @ up, out @ dense_down.T, sides["hidden"].T @ out

    layout = Rows.of(indices, counts, kind)
    x_RD, hidden_RF, mid_R2F = (random(len(layout.token_R), side.shape[1]) for side in sides.values())
    gate_up_, down_ = gate_up.detach(), down.detach()

    def alone() -> None:
        _ = layout.matmul(x_RD, gate_up_.transpose(1, 2)), layout.matmul(hidden_RF, down_.transpose(1, 2))
        _ = layout.matmul(mid_R2F, gate_up_), layout.outer(mid_R2F, x_RD)
        _ = layout.matmul(x_RD, down_), layout.outer(x_RD, hidden_RF)

    seconds = in_turn({"dense": dense, "gemms": alone, "whole": whole}, rounds)
    flops = 3 * 2 * rows * 3 * sizes["I"] * sizes["D"]
    return {
        "dense_gflops": flops / seconds["dense"] / 1e9,
        "gemms_of_dense": seconds["dense"] / seconds["gemms"],
        "whole_of_dense": seconds["dense"] / seconds["whole"],
    }


def compare(shape: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Every figure of one shape and type."""
    sizes = {name: int(value) for name, value in re.findall(r"([DEKI])(\d+)", shape)}
    ours = our_model(sizes, dtype)
    theirs = {name: their_model(sizes, dtype, name) for name in ("eager", "grouped_mm")}
    rows = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    prompts = rows[:, :PROMPT].repeat(-(-PROMPTS // SEQUENCES), 1)[:PROMPTS].clone()
    prompts[:, 0] = torch.arange(PROMPTS)  # all different: ours reads equal prompts once

    def our_step() -> None:
        ours.zero_grad()
        ours.loss(rows).loss.backward()

    def their_step(model: Any) -> Callable[[], None]:
        def step() -> None:
            model.train().zero_grad()
            model(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss.backward()

        return step

    def their_answers(model: Any) -> Callable[[], None]:
        def answer() -> None:
            found = model.eval().generate(
                prompts, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0
            )
            assert found.shape == (PROMPTS, PROMPT + ANSWER)

        return answer

    training = in_turn({"ours": our_step, **{name: their_step(model) for name, model in theirs.items()}}, rounds)
    decoding = in_turn(
        {
            "ours": lambda: generate(ours.eval(), prompts.tolist(), ANSWER, 0.0, set(), 0),
            **{name: their_answers(model) for name, model in theirs.items()},
        },
        max(1, rounds // 2),
    )
    ours.train()
    found: dict[str, Any] = {"shape": shape, "type": dtype}
    for name, seconds, count in (
        ("training", training, SEQUENCES * LENGTH),
        ("decoding", decoding, PROMPTS * ANSWER),
    ):
        found[name] = {side: count / value for side, value in seconds.items()}
        found[name]["ratio"] = min(seconds["eager"], seconds["grouped_mm"]) / seconds["ours"]
    return found | {"experts": expert_gemms(sizes, dtype, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="D hidden, E experts, K chosen, I expert width")
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"tokens/s, {options.threads} threads, torch {torch.__version__}")
    print(f"{'shape':18}{'type':10}{'':10}{'ours':>9}{'eager':>9}{'grouped_mm':>12}{'ratio':>7}")
    results = []
    for shape in options.shapes:
        for dtype in options.types:
            found = compare(shape, dtype, options.rounds)
            results.append(found)
            for part in ("training", "decoding"):
                f = found[part]
                print(
                    f"{shape:18}{dtype:10}{part:10}{f['ours']:9,.0f}{f['eager']:9,.0f}{f['grouped_mm']:12,.0f}"
                    f"{f['ratio']:7.2f}",
                    flush=True,
                )
            f = found["experts"]
            print(
                f"{shape:18}{dtype:10}expert GEMMs {f['gemms_of_dense']:.0%} of a dense product "
                f"({f['dense_gflops']:.0f} GFLOP/s); whole operation {f['whole_of_dense']:.0%}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps({"threads": options.threads, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
