"""Our preparation of data (read, drop exact duplicates, tokenise, write shards) beside datasets and datatrove.

    pip install datasets datatrove                    # the peers; a missing one is left out
    python benchmarks/data_cpu.py                     # 50 MB of text, 2 cores, 3 rounds
    python benchmarks/data_cpu.py --megabytes 10 --rounds 1 --json figures.json

All sides read the same JSONL files (Python source of the standard library and of installed packages, procedural
problems), have the same tokenizer and cores, and must give the same number of tokens. They run in turn in one process,
round after round; each figure is the median of its rounds, processes' start included. Ratios above 1 mean that ours is
faster; CPU seconds (all processes) tell more than the clock where other jobs share the cores.

- `datasets`: from_json, filter by SHA-256, map(batched, num_proc), uint16 to a file.
- `datatrove`: JsonlReader and DocumentTokenizer, one file per task, without looking for duplicates (it has no step that
  drops exact ones over all tasks).
- `ours, processes`: one per core, which is not the default with so few.
- `ours, all filters`: looks for near duplicates and evaluation problems, and bounds quality, besides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ling_flow.data import examine
from ling_flow.data.build import build_corpus
from ling_flow.data.chat import SPECIAL_TOKENS, THINK_TOKENS
from ling_flow.data.documents import documents
from ling_flow.data.files import split_text
from ling_flow.data.filters import Decontamination, Filters, NearDuplicates, QualityFilter
from ling_flow.data.reasoning import TaskSpec
from ling_flow.data.sources import FilesSource, ReasoningSource
from ling_flow.data.tokenizer import Tokenizer, train_tokenizer

TASKS = [TaskSpec(name="chain_sum", difficulties=(1, 2, 3)), TaskSpec(name="gcd")]
ALL_FILTERS = Filters(
    near_duplicates=NearDuplicates(),
    decontamination=Decontamination(tasks=tuple(TASKS)),
    quality=QualityFilter(min_alphabetic_share=0.01),
)
VOCABULARY = 16_384


def python_files() -> Iterator[str]:
    for place in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(place)).rglob("*.py")):
            yield from split_text(file.read_text(encoding="utf-8", errors="replace"))


def problem_texts() -> Iterator[str]:
    source = ReasoningSource(name="r", tasks=TASKS, style="chain_of_thought", documents=1_000_000)
    return documents(source, seed=0)


def write_texts(folder: Path, megabytes: float, files: int) -> list[Path]:
    """Different documents without marks of the chat format, a tenth of them problems, over `files` files."""
    marks = (*SPECIAL_TOKENS, *THINK_TOKENS)
    paths = [folder / f"{number}.jsonl" for number in range(files)]
    streams = [path.open("w", encoding="utf-8") for path in paths]
    seen: set[bytes] = set()
    for texts, share in ((python_files(), 0.9), (problem_texts(), 0.1)):
        written = 0
        for text in texts:
            digest = hashlib.sha256(text.encode()).digest()
            if not text.strip() or digest in seen or any(mark in text for mark in marks):
                continue
            seen.add(digest)
            streams[len(seen) % files].write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= share * megabytes * 1e6:
                break
    for stream in streams:
        stream.close()
    return paths


def ours(paths: list[Path], tokenizer: Path, out: Path, workers: int, filters: Filters | None = None) -> int:
    sources = [FilesSource(name="text", paths=[str(path) for path in paths])]
    corpus = build_corpus(
        out, sources, vocab_size=VOCABULARY, validation_share=0.01, tokenizer_characters=1, seed=0,
        tokenizer=Tokenizer.load(tokenizer), workers=workers, filters=filters,
    )  # fmt: skip
    return corpus.statistics.tokens


def with_datasets(paths: list[Path], tokenizer: Path, out: Path, cores: int) -> int:
    import datasets
    from tokenizers import Tokenizer as Engine

    datasets.disable_progress_bars()
    engine = Engine.from_file(str(tokenizer / "tokenizer.json"))
    end = engine.token_to_id("<|endoftext|>")
    seen: set[bytes] = set()

    def is_new(batch: dict[str, list[str]]) -> list[bool]:
        digests = [hashlib.sha256(text.encode()).digest() for text in batch["text"]]
        news = [digest not in seen for digest in digests]
        seen.update(digests)
        return news

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": [[*found.ids, end] for found in engine.encode_batch_fast(batch["text"])]}

    table = datasets.Dataset.from_json([str(path) for path in paths], cache_dir=str(out / "cache"))
    table = table.filter(is_new, batched=True, load_from_cache_file=False)
    table = table.map(
        encode, batched=True, num_proc=cores, remove_columns=table.column_names, load_from_cache_file=False
    )
    tokens = 0
    with (out / "tokens.bin").open("wb") as stream:
        for batch in table.with_format("arrow").iter(batch_size=1000):
            ids = batch["ids"].combine_chunks().flatten().to_numpy()
            stream.write(ids.astype(np.uint16).tobytes())
            tokens += len(ids)
    return tokens


def with_datatrove(paths: list[Path], tokenizer: Path, out: Path, cores: int) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    steps = [
        JsonlReader(str(paths[0].parent), glob_pattern="*.jsonl"),
        DocumentTokenizer(
            str(out / "tokens"), str(tokenizer / "tokenizer.json"), eos_token="<|endoftext|>", shuffle_documents=False
        ),
    ]
    logs = str(out / "logs")
    LocalPipelineExecutor(steps, tasks=len(paths), workers=cores, logging_dir=logs, start_method="spawn").run()
    return sum(file.stat().st_size for file in (out / "tokens").glob("*.ds")) // 2


def cpu_time() -> float:
    """CPU seconds of this process and of those that have ended."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cores = arguments.cores
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    examine.ALONE_CHARACTERS = min(examine.ALONE_CHARACTERS, int(arguments.megabytes * 1e6 / 3))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        paths = write_texts(folder / "text", arguments.megabytes, cores)
        sample = [json.loads(line)["text"] for path in paths for line in path.open(encoding="utf-8")][::10]
        tokenizer = folder / "tokenizer"
        train_tokenizer(sample, VOCABULARY).save(tokenizer)

        runs: dict[str, Callable[[Path], int]] = {
            "ours": lambda out: ours(paths, tokenizer, out, examine.default_workers()),
            "ours, processes": lambda out: ours(paths, tokenizer, out, cores),
            "datasets": lambda out: with_datasets(paths, tokenizer, out, cores),
            "datatrove": lambda out: with_datatrove(paths, tokenizer, out, cores),
            "ours, all filters": lambda out: ours(paths, tokenizer, out, examine.default_workers(), ALL_FILTERS),
        }
        for peer in ("datasets", "datatrove"):
            try:
                __import__(peer)
            except ImportError as error:
                print(f"{peer}: left out, it is not installed ({error})")
                del runs[peer]
        seconds: dict[str, list[float]] = {run: [] for run in runs}
        cpu_seconds: dict[str, list[float]] = {run: [] for run in runs}
        tokens: dict[str, int] = {}
        for _ in range(arguments.rounds):
            for run, prepare in runs.items():
                out = folder / "out"
                out.mkdir()
                # A process per core: a peer's processes need no threads of their own.
                os.environ["TOKENIZERS_PARALLELISM"] = "true" if run.startswith("ours") else "false"
                start, cpu_start = time.perf_counter(), cpu_time()
                tokens[run] = prepare(out)
                seconds[run].append(time.perf_counter() - start)
                cpu_seconds[run].append(cpu_time() - cpu_start)
                shutil.rmtree(out)
                taken = f"{seconds[run][-1]:.1f} s, {cpu_seconds[run][-1]:.1f} CPU seconds"
                print(f"  {run}: {taken}, {tokens[run]:,} tokens", flush=True)
        for run in runs:
            if run != "ours, all filters" and tokens[run] != tokens["ours"]:
                raise SystemExit(f"{run}: gave {tokens[run]:,} tokens, ours {tokens['ours']:,}: not the same work")

        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        print(f"{megabytes:.0f} MB of JSONL, {tokens['ours']:,} tokens, vocabulary {VOCABULARY:,}, {cores} cores")
        figures = {}
        for run in runs:
            clock, cpu = statistics.median(seconds[run]), statistics.median(cpu_seconds[run])
            ratio = clock / statistics.median(seconds["ours"])
            cpu_ratio = cpu / statistics.median(cpu_seconds["ours"])
            rate = tokens["ours"] / clock
            figures[run] = {"tokens_per_second": rate, "ratio": ratio, "cpu_seconds": cpu, "cpu_ratio": cpu_ratio}
            print(
                f"{run:18} {clock:6.1f} s  {rate:10,.0f} tokens/s  {cpu:6.1f} CPU s   "
                f"ours is {ratio:.2f} times as fast, {cpu_ratio:.2f} by CPU time"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
