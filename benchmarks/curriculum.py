"""Does the staged curriculum help? Each stage with its own mixture, against one mixture of the same tokens throughout.

    python benchmarks/curriculum.py                                  # preset tiny, 3 seeds: 40 minutes on two cores
    python benchmarks/curriculum.py --preset small --json small.json # some 9 hours

`flat` gives every stage the mean of the three mixtures, weighted by the stages' tokens: the same model, tokens of each
source, contexts, learning rate and merge; only the order of the data differs. A seed is that of initial weights and of
the order within each source; corpus and scaling law are shared. Reported are the merged base model and the same after
the capability pass: exact match on held-out problems, and loss on the corpus's validation parts. Finished steps are
served from `--home`, so an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from components.plan import LifecycleConfig
from components.plan.presets import PRESETS
from components.pretrain import PretrainConfig

STAGES = ("pretrain_short", "pretrain_mid", "pretrain_long")
KINDS = ("staged", "flat")
FIGURES = ("exact_match_thinking_on", "exact_match_thinking_off", "validation_loss")


def stages_of(preset: str, kind: str, seed: int, threads: int) -> list[PretrainConfig]:
    """The configs of the three stages."""
    configs: list[PretrainConfig] = [getattr(PRESETS[preset](seed), name) for name in STAGES]
    changes: dict[str, Any] = {"threads": threads}
    if kind == "flat":
        total = sum(config.tokens for config in configs)
        sources = {source for config in configs for source in config.mixture or ()}
        changes["mixture"] = {
            source: sum(config.tokens * (config.mixture or {}).get(source, 0.0) for config in configs) / total
            for source in sorted(sources)
        }
    return [config.model_copy(update=changes) for config in configs]


def shared(preset: str) -> tuple[LifecycleConfig, str, str]:
    """Corpus and scaling law of all runs, by reference."""
    from components.fit_scaling_laws import fit_scaling_laws
    from components.prepare_data import prepare_data
    from components.wind_tunnel import wind_tunnel
    from ling_flow.flow.tracking import NullTracker

    config = PRESETS[preset](0)
    corpus = prepare_data(config.prepare_data, tracker=NullTracker()).refs["corpus"]
    trials = wind_tunnel(config.wind_tunnel, tracker=NullTracker(), corpus=corpus).refs["trials"]
    law = fit_scaling_laws(config.fit_scaling_laws, tracker=NullTracker(), trials=trials)
    return config, corpus, law.refs["scaling_law"]


def one_run(preset: str, kind: str, seed: int, threads: int) -> dict[str, dict[str, float]]:
    """Figures of the base model and of the same after the capability pass."""
    from components.capability_pass import capability_pass
    from components.evaluate import evaluate
    from components.merge_checkpoints import merge_checkpoints
    from components.pretrain import pretrain
    from ling_flow.flow.tracking import NullTracker

    config, corpus, law = shared(preset)
    quiet = NullTracker()
    previous: str | None = None
    for stage in stages_of(preset, kind, seed, threads):
        done = pretrain(stage, tracker=quiet, corpus=corpus, scaling_law=law, previous=previous)
        previous = done.refs["checkpoints"]
    merge = config.merge_checkpoints.model_copy(update={"threads": threads})
    base = merge_checkpoints(merge, tracker=quiet, checkpoints=previous, corpus=corpus).refs["model"]
    pass_ = config.capability_pass.model_copy(update={"threads": threads})
    capable = capability_pass(pass_, tracker=quiet, base=base, corpus=corpus).refs["model"]
    asked = config.evaluate.model_copy(update={"threads": threads})
    found = {}
    for name, model in (("base", base), ("capability pass", capable)):
        result = evaluate(asked, tracker=quiet, model=model, corpus=corpus).result
        found[name] = {figure: float(getattr(result, figure)) for figure in FIGURES}
    print(f"{kind} seed {seed}: {json.dumps(found)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--home", type=Path, default=Path(".lingflow"), help="where artifacts are kept")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    os.environ["LING_FLOW_HOME"] = str(arguments.home.absolute())
    shared(arguments.preset)
    runs = list(itertools.product(KINDS, arguments.seeds))
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        futures = {
            (kind, seed): pool.submit(one_run, arguments.preset, kind, seed, arguments.threads)
            for seed in arguments.seeds
            for kind in KINDS
        }
        found = {run: futures[run].result() for run in runs}
    print(f"\n{'':>16} {'':>7} " + " ".join(f"{figure:>25}" for figure in FIGURES))
    for model, kind in itertools.product(("base", "capability pass"), KINDS):
        cells = []
        for figure in FIGURES:
            values = [found[kind, seed][model][figure] for seed in arguments.seeds]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}")
        print(f"{model:>16} {kind:>7} " + " ".join(f"{cell:>25}" for cell in cells))
    if arguments.json:
        rows = [{"kind": kind, "seed": seed, **figures} for (kind, seed), figures in found.items()]
        arguments.json.write_text(json.dumps({"preset": arguments.preset, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
