"""What is known about a corpus beside its tokens: the content of `corpus.json`."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field

from ling_flow.config import StrictModel

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class SplitStatistics(StrictModel):
    """One split of one source."""

    documents: int = Field(description="documents")
    tokens: int = Field(description="tokens, end-of-text tokens included")
    digest: str = Field(description="SHA-256 of the shard")


class Contaminated(StrictModel):
    """A document that was left out for an evaluation problem."""

    ngram: str = Field(description="the shared words")
    text: str = Field(description="beginning of the document")


class SourceStatistics(StrictModel):
    """One source."""

    train: SplitStatistics
    validation: SplitStatistics
    duplicates: int = Field(description="documents left out because the corpus already held them")
    near_duplicates: int = Field(description="documents left out because the corpus held one that is near")
    contaminated: int = Field(description="documents left out because they hold an evaluation problem")
    low_quality: int = Field(description="documents left out by the bounds of quality")
    characters: int = Field(description="characters of its documents")
    mean_line_length: float = Field(description="characters per line that is not blank")
    alphabetic_share: float = Field(description="letters of any script, of all characters, 0 to 1")
    repeated_line_share: float = Field(description="lines that stand further up in the same document, 0 to 1")
    length_histogram: list[int] = Field(
        description="documents by length: entry i counts those of 2^i to 2^(i+1) - 1 tokens"
    )
    samples: list[str] = Field(description="beginnings of some documents, those of lowest SHA-256")
    contaminated_samples: list[Contaminated] = Field(description="some of the documents that hold evaluation problems")
    unigram_entropy: float = Field(
        description="cross-entropy of its validation tokens under its own training unigram, nats per token"
    )

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.validation.tokens

    @property
    def documents(self) -> int:
        return self.train.documents + self.validation.documents


class FilterStatistics(StrictModel):
    """How far the filters that were asked for could look; null: not asked for."""

    problems: int | None = Field(None, description="evaluation problems that documents were compared with")
    short_problems: int | None = Field(None, description="evaluation problems too short to be looked for")
    partly_compared: int | None = Field(
        None, description="documents kept though so many are alike in part (a template) that not all were compared"
    )


class CorpusStatistics(StrictModel):
    """What `corpus.json` holds."""

    schema_version: Literal[2] = 2
    vocab_size: int = Field(description="token ids of the tokenizer")
    tokenizer_digest: str = Field(description="SHA-256 of tokenizer.json")
    chat_template_digest: str = Field(description="SHA-256 of the chat template")
    unigram_entropy: float = Field(
        description="cross-entropy of all validation tokens under the unigram of all training tokens, nats per token"
    )
    filters: FilterStatistics | None = Field(None, description="of near duplicates and decontamination; null: neither")
    sources: dict[str, SourceStatistics]

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources.values())

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.sources.values())

    @property
    def duplicates(self) -> int:
        return sum(source.duplicates for source in self.sources.values())

    @property
    def near_duplicates(self) -> int:
        return sum(source.near_duplicates for source in self.sources.values())

    @property
    def contaminated(self) -> int:
        return sum(source.contaminated for source in self.sources.values())

    @property
    def low_quality(self) -> int:
        return sum(source.low_quality for source in self.sources.values())

    @property
    def digest(self) -> str:
        """SHA-256 over the tokenizer and all shards."""
        parts = [self.tokenizer_digest]
        for name, source in sorted(self.sources.items()):
            parts += [name, source.train.digest, source.validation.digest]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
