from pathlib import Path

import pytest

from ling_flow.data.build import build_corpus
from ling_flow.data.corpus import Corpus
from ling_flow.data.reasoning import TaskSpec
from ling_flow.data.sources import ReasoningSource, Source, StdlibSource

SUMS = [TaskSpec(name="chain_sum", difficulties=(1, 2))]
SOURCES: list[Source] = [
    StdlibSource(name="code", part="code", max_characters=60_000),
    ReasoningSource(name="sums", tasks=SUMS, style="plain", documents=120),
    ReasoningSource(name="chat", tasks=SUMS, style="chat", documents=100, problems_per_document=1),
]


def build(path: Path, sources: list[Source] = SOURCES, validation_share: float = 0.1, seed: int = 0) -> Corpus:
    return build_corpus(
        path, sources, vocab_size=400, validation_share=validation_share, tokenizer_characters=30_000, seed=seed
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build(tmp_path_factory.mktemp("data") / "corpus")
