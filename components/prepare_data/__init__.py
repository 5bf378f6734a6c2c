"""Prepare data: sources → documents → tokenizer → token shards."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from components.problems import TASKS
from ling_flow.config import StrictModel, context_field
from ling_flow.data.documents import pin
from ling_flow.data.filters import Filters
from ling_flow.data.sources import ReasoningSource, Source, StdlibSource
from ling_flow.data.tokenizer import Tokenizer, tokenizer_digest
from ling_flow.errors import UserError
from ling_flow.flow.component import HTML, Dataset, Output, Resources, Step, component


def default_sources() -> list[Source]:
    """About four million tokens that any machine with Python has: its standard library, and procedural problems."""
    tasks = list(TASKS)
    return [
        StdlibSource(name="python_code", part="code", max_characters=1_500_000),
        StdlibSource(name="python_prose", part="prose", max_characters=1_500_000),
        ReasoningSource(name="reasoning_plain", tasks=tasks, style="plain", documents=8_000, problems_per_document=8),
        ReasoningSource(name="reasoning_cot", tasks=tasks, style="chain_of_thought", documents=8_000),
        ReasoningSource(name="reasoning_chat", tasks=tasks, style="chat", documents=8_000),
    ]


class PrepareDataConfig(StrictModel):
    """What the corpus is made of."""

    sources: list[Source] = Field(
        default_factory=default_sources, min_length=1, description="where documents come from"
    )
    tokenizer: str | None = context_field(
        None,
        why="the content bears identity, through tokenizer_digest; where it lies does not",
        description="directory (or fsspec URL) with the tokenizer.json to use, as published; null: train one",
    )
    tokenizer_digest: str | None = Field(
        None, description="SHA-256 of that tokenizer.json; filled in before the step runs, and held to when given"
    )
    vocab_size: int = Field(
        1024, ge=265, description="token ids to learn, special tokens included; not used with a given tokenizer"
    )
    validation_share: float = Field(
        0.03, gt=0, le=0.5, description="share of the documents kept for validation, 0 to 0.5"
    )
    tokenizer_characters: int = Field(1_000_000, ge=1, description="characters the tokenizer learns from, in all")
    filters: Filters = Field(Filters(), description="what is left out of files and the standard library")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of sampling and of the procedural problems")
    workers: int | None = context_field(
        None,
        why="the corpus is the same, to the bit, for any number",
        description="processes that tokenise a large corpus; null: one per core, with up to 4 cores none but this",
        ge=1,
    )

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two sources are named '{twice}'; names must differ")
        return sources

    @model_validator(mode="after")
    def _digest_of_something(self) -> Self:
        if self.tokenizer_digest is not None and self.tokenizer is None:
            raise ValueError("tokenizer_digest: needs tokenizer, which says where the tokenizer.json lies")
        return self


class PrepareDataResult(StrictModel):
    """What the corpus holds."""

    tokens: int = Field(description="tokens of all sources, validation included")
    documents: int = Field(description="different documents")
    duplicates: int = Field(description="documents left out because the corpus already held them")
    near_duplicates: int = Field(description="documents left out because the corpus held one that is near")
    contaminated: int = Field(description="documents left out because they hold an evaluation problem")
    low_quality: int = Field(description="documents left out by the bounds of quality")
    unigram_entropy: float = Field(
        description="cross-entropy of validation under the training unigram, nats per token; a model must be below"
    )
    vocab_size: int = Field(description="token ids of the tokenizer, special tokens included")


def _pinned(config: PrepareDataConfig) -> PrepareDataConfig:
    pinned: dict[str, Any] = {"sources": [pin(source) for source in config.sources]}
    if decontamination := config.filters.decontamination:
        files = tuple(pin(source) for source in decontamination.files)
        filters = {"decontamination": decontamination.model_copy(update={"files": files})}
        pinned["filters"] = config.filters.model_copy(update=filters)
    if config.tokenizer is None:
        return config.model_copy(update=pinned)
    digest = tokenizer_digest(config.tokenizer)
    if config.tokenizer_digest not in (None, digest):
        raise UserError(f"tokenizer_digest: content is {digest!r}, not {config.tokenizer_digest!r} as given")
    return config.model_copy(update={**pinned, "tokenizer_digest": digest})


def _given_tokenizer(config: PrepareDataConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(config.tokenizer)
    if config.tokenizer_digest not in (None, tokenizer.digest):
        raise UserError(f"tokenizer: {config.tokenizer} has changed since its digest was taken; run again")
    return tokenizer


@component(version=4, resources=Resources(cpus=2, memory_gib=4), resolve=_pinned)
def prepare_data(
    config: PrepareDataConfig, corpus: Output[Dataset], report: Output[HTML], step: Step
) -> PrepareDataResult:
    """Read the sources, train a tokenizer or take the given one, and write deduplicated token shards."""
    from ling_flow.data.build import build_corpus
    from ling_flow.data.examine import default_workers
    from ling_flow.data.report import filter_lines, html_page

    built = build_corpus(
        corpus.path,
        config.sources,
        vocab_size=config.vocab_size,
        validation_share=config.validation_share,
        tokenizer_characters=config.tokenizer_characters,
        seed=config.seed,
        tokenizer=_given_tokenizer(config),
        filters=config.filters,
        workers=config.workers or default_workers(),
        progress=step.progress,
    )
    statistics = built.statistics
    page = report.path / "index.html"
    page.write_text(html_page(statistics, f"Corpus of {', '.join(statistics.sources)}"), encoding="utf-8")
    step.tracker.artifact(page)
    for line in filter_lines(statistics):
        step.log(line)
    for name, source in statistics.sources.items():
        step.log(f"{name}: {source.tokens:,} tokens, {source.unigram_entropy:.3f} nats per token under its unigram")
    corpus.contract.update(
        tokenizer=statistics.tokenizer_digest,
        chat_template=statistics.chat_template_digest,
        vocab_size=statistics.vocab_size,
    )
    return PrepareDataResult(
        tokens=statistics.tokens,
        documents=statistics.documents,
        duplicates=statistics.duplicates,
        near_duplicates=statistics.near_duplicates,
        contaminated=statistics.contaminated,
        low_quality=statistics.low_quality,
        unigram_entropy=statistics.unigram_entropy,
        vocab_size=statistics.vocab_size,
    )
