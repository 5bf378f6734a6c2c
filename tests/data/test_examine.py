import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ling_flow.data import build as building
from ling_flow.data import examine
from ling_flow.data.build import build_corpus
from ling_flow.data.corpus import Corpus
from ling_flow.data.filters import Decontamination, Filters, NearDuplicates, QualityFilter
from ling_flow.data.reasoning import TaskSpec
from ling_flow.data.sources import FilesSource, ReasoningSource, Source
from ling_flow.errors import SystemFault

SUMS = TaskSpec(name="chain_sum", difficulties=(1, 2))
FILTERS = Filters(
    near_duplicates=NearDuplicates(threshold=0.6, ngram=2),
    decontamination=Decontamination(tasks=(SUMS,), problems=100),
    quality=QualityFilter(min_mean_line_length=20),
)


def sources(folder: Path) -> list[Source]:
    """A thousand texts with exact and near duplicates, held-out sums and short lines; and conversations."""
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(500)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randrange(2, 60))) for _ in range(700)]
    texts += [f"{text} more" for text in rng.choices(texts, k=200)] + rng.choices(texts, k=50)
    texts += [f"some words and {a} + {b} = {a + b}" for a in range(1, 10) for b in range(1, 10)]
    rng.shuffle(texts)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    conversations = ReasoningSource(name="chat", tasks=[SUMS], style="chat", documents=150)
    return [FilesSource(name="mine", paths=[str(folder / "a.jsonl")]), conversations]


def build(folder: Path, name: str, workers: int) -> Corpus:
    return build_corpus(
        folder / name, sources(folder), vocab_size=400, validation_share=0.1, tokenizer_characters=20_000, seed=0,
        filters=FILTERS, workers=workers,
    )  # fmt: skip


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BATCH_DOCUMENTS", 40)
    monkeypatch.setattr(examine, "ALONE_CHARACTERS", 8_000)  # the first batches in this process, the others in others


def test_any_number_of_processes_gives_the_same_bytes(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    submit = examine.Examiners._submit
    monkeypatch.setattr(examine.Examiners, "_submit", lambda self, batch: started.append(1) or submit(self, batch))
    alone = build(tmp_path, "alone", workers=1)
    assert not started
    statistics = alone.statistics.sources["mine"]
    assert min(statistics.duplicates, statistics.near_duplicates, statistics.contaminated, statistics.low_quality) > 3
    files = sorted(file.relative_to(alone.path) for file in alone.path.rglob("*") if file.is_file())
    for workers in (2, 3):
        started.clear()
        together = build(tmp_path, f"with {workers}", workers)
        assert len(started) > 15
        assert sorted(file.relative_to(together.path) for file in together.path.rglob("*") if file.is_file()) == files
        for file in files:
            assert (together.path / file).read_bytes() == (alone.path / file).read_bytes()


def test_a_killed_process_is_a_fault_in_one_line_and_leaves_nothing(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest = examine.Examiners._oldest

    def kill_first(self: examine.Examiners, under_way: object) -> object:
        assert self.pool
        for process in self.pool._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        return oldest(self, under_way)  # type: ignore[arg-type]

    monkeypatch.setattr(examine.Examiners, "_oldest", kill_first)
    with pytest.raises(SystemFault, match="workers: a process that tokenises was killed") as caught:
        build(tmp_path, "corpus", workers=2)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


SCRIPT = """
import sys, time
from pathlib import Path
from ling_flow.data import examine
from ling_flow.data.filters import Filters
from ling_flow.data.tokenizer import train_tokenizer

if __name__ == "__main__":
    examine.ALONE_CHARACTERS = 0
    tokenizer = train_tokenizer(["some text"], 300)
    tokenizer.save(Path(sys.argv[1]))
    examiners = examine.Examiners(examine.Examiner(tokenizer, Filters(), None), 2, Path(sys.argv[1]))
    list(examiners.map(iter([examine.Batch([text], [b""], False, False) for text in ("one", "two")])))
    print(*examiners.pool._processes, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "tokenizer")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    children = [int(number) for number in parent.stdout.readline().split()]
    assert children and all(Path(f"/proc/{child}").exists() for child in children)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(_runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(child) for child in children)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
