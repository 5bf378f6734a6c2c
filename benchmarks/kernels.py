"""Every kernel on one GPU: time, share of the floor, and the peers that can be imported, in one table.

    python benchmarks/kernels.py --json kernels.json         # what fits into 7 minutes (--budget)
    python benchmarks/kernels.py --only "quantise" --sweep   # some, with every candidate of tile sizes
    python benchmarks/kernels.py --compile 8 …               # only compile what would be measured, in 8 processes
    python benchmarks/kernels.py --list                      # the cases and their floors; needs no GPU

Needs torch and Triton, nothing else of the project's dependencies. The floor of a case is the bytes that must move at
the copy rate measured first, or its FLOPs at the rate of its type, whichever takes longer: bfloat16 as measured first,
FP8 and TF32 nominal for Hopper (1,979 and 494 TFLOP/s). Times are medians by CUDA events, the L2 cache flushed before
each, of the device alone: it is kept waiting until the host has issued the whole call. FP8 operations include their
quantisation where the case says so. A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import pkgutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare machine: nothing is installed

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Case, Prepared

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
NOMINAL = {"fp8": 1979e12, "tf32": 494e12}  # FLOP/s
ASSUMED_COPY, ASSUMED_BF16 = 4.3e12, 790e12  # of an H200, for `--list`


def all_cases() -> list[Case]:
    """The first shape of every operation, then the second of each, …: what the budget cuts off is the rest of many
    operations, not all of one."""
    modules = pkgutil.iter_modules(kernel_cases.__path__, f"{kernel_cases.__name__}.")
    by_operation: dict[str, list[Case]] = {}
    for module in modules:
        for case in importlib.import_module(module.name).cases():
            by_operation.setdefault(case.op, []).append(case)
    rounds = itertools.zip_longest(*by_operation.values())
    return [case for cases in rounds for case in cases if case is not None]


SECONDS = 0.25  # of repeated calls per figure; `--seconds`


def median_seconds(run: Callable[[], object], flush: torch.Tensor) -> float:
    """Median time of a call on the device, after two calls that compile and warm up."""
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    issued = time.perf_counter() - started
    torch.cuda.synchronize()
    repeats = max(5, min(50, int(SECONDS / max(time.perf_counter() - started, 1e-6))))
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(int(2e9 * 2 * min(issued, 0.01)))  # cycles at 2 GHz: twice as long as issuing takes
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1e3


def machine(flush: torch.Tensor) -> dict[str, Any]:
    """What the floors are measured against."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), flush)
    target = source = torch.empty(0)  # free
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    bf16 = 2 * 8192**3 / median_seconds(lambda: left @ right, flush)
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_second": copy,
        "bf16_flops_per_second": bf16,
    }


def floor_seconds(case: Case, copy: float, bf16: float) -> float:
    rate = bf16 if case.kind == "bf16" else NOMINAL[case.kind]
    return max(case.moved / copy, case.flops / rate)


def measure(case: Case, facts: dict[str, Any], flush: torch.Tensor, sweep: bool) -> dict[str, Any]:
    """Every figure of one case; what fails is told and does not stop the rest."""
    floor = floor_seconds(case, facts["copy_bytes_per_second"], facts["bf16_flops_per_second"])
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "floor_us": floor * 1e6}

    def timed(prepare: Prepared) -> float:
        try:
            return median_seconds(prepare(), flush)
        finally:
            free, total = torch.cuda.mem_get_info()
            if free < total // 2:
                gc.collect()
                torch.cuda.empty_cache()

    try:
        seconds = timed(case.ours)
    except Exception:
        row["error"] = traceback.format_exc(limit=-3)
        return row
    row |= {"us": seconds * 1e6, "share": floor / seconds, "tflops": case.flops / seconds / 1e12}
    row["gb_per_second"] = case.moved / seconds / 1e9
    row["peers"] = {}
    for name, prepare in case.peers.items():
        try:
            row["peers"][name] = timed(prepare) * 1e6
        except ModuleNotFoundError:
            continue
        except Exception as error:
            row["peers"][name] = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if sweep:
        row["variants"] = {}
        for name, prepare in case.variants.items():
            try:
                row["variants"][name] = timed(prepare) * 1e6
            except Exception as error:
                row["variants"][name] = f"failed: {type(error).__name__}"
    if case.check is not None:
        row["relative_error"] = case.check()
    if case.gate is not None:
        row["gate"], row["reached"] = case.gate, reached(case, row)
    return row


def reached(case: Case, row: dict[str, Any]) -> bool | None:
    """Whether the gate is met; None where the peer it names could not be measured."""
    assert case.gate is not None
    kind, least = case.gate
    if kind != "ratio":
        return bool(row[kind] >= least)
    peer = row["peers"].get(case.against)
    return bool(peer / row["us"] >= least) if isinstance(peer, float) else None


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['op']:38}{row['shape']:18} failed\n{row['error']}", flush=True)
        return
    rate = f"{row['tflops']:7.0f} TF/s" if row["tflops"] else f"{row['gb_per_second']:7.0f} GB/s"
    peers = ", ".join(
        f"{name} {value:.0f} µs ({value / row['us']:.2f}×)" if isinstance(value, float) else f"{name} {value}"
        for name, value in row["peers"].items()
    )
    gate = {True: " ok  ", False: " MISS", None: "     "}[row.get("reached")]
    error = f" error {row['relative_error']:.1e}" if "relative_error" in row else ""
    print(
        f"{row['op']:38}{row['shape']:18}{row['us']:9.1f}{row['floor_us']:9.1f}{row['share']:7.0%}{gate}"
        f"{rate:>14}{error}  {peers}",
        flush=True,
    )
    for name, value in row.get("variants", {}).items():
        print(f"    {name:60}" + (f"{value:9.1f}" if isinstance(value, float) else value), flush=True)


def compile_only(cases: list[Case], sweep: bool) -> None:
    """Call everything once, untimed: Triton keeps what it compiles. What fails will be told when it is measured."""
    for case in cases:
        for prepare in (case.ours, *case.peers.values(), *(case.variants.values() if sweep else ())):
            with contextlib.suppress(Exception):
                prepare()()
                torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()


def compile_in_parallel(processes: int) -> None:
    """This same command in so many processes, each with its share of the cases."""
    arguments = [sys.executable, *sys.argv]
    parts = [subprocess.Popen([*arguments, "--part", str(part)]) for part in range(processes)]
    if any([part.wait() for part in parts]):
        raise SystemExit("benchmarks/kernels.py: a compiling process failed")


def main() -> None:
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose operation or shape contains one of these")
    parser.add_argument("--sweep", action="store_true", help="also every candidate of tile sizes")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no further case is begun")
    parser.add_argument("--json", type=Path, help="write the figures to this file, after every case")
    parser.add_argument("--list", action="store_true", help="print the cases and the floors of an H200")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of repeated calls per figure")
    parser.add_argument("--compile", type=int, metavar="N", help="measure nothing, compile in N processes")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of those processes, which
    options = parser.parse_args()
    SECONDS = options.seconds
    cases = [case for case in all_cases() if any(part in f"{case.op}, {case.shape}" for part in options.only)]
    if options.list:
        for case in cases:
            print(f"{case.op:38}{case.shape:18}{floor_seconds(case, ASSUMED_COPY, ASSUMED_BF16) * 1e6:9.1f} µs")
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py: needs a CUDA device (`--list` does not)")
    if options.part is not None:
        return compile_only(cases[options.part :: options.compile], options.sweep)
    if options.compile:
        return compile_in_parallel(options.compile)
    started = time.perf_counter()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    facts = machine(flush)
    print(json.dumps(facts, indent=2))
    print(f"{'operation':38}{'shape':18}{'µs':>9}{'floor':>9}{'share':>7}")
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(cases):
        if time.perf_counter() - started > options.budget:
            print(f"{len(cases) - index} cases left out: {options.budget:.0f} s are over")
            break
        rows.append(measure(case, facts, flush, options.sweep))
        show(rows[-1])
        if options.json is not None:
            options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
