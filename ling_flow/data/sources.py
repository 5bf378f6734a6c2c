"""Where documents come from: typed declarations, light to import. `documents.py` reads them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ling_flow.config import StrictModel, context_field
from ling_flow.data.reasoning import TaskSpec


class SourceBase(StrictModel):
    """What all sources have."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="name of the source in the corpus and in mixtures")
    digest: str | None = Field(
        default=None, description="digest of the content; filled in before the step runs, and held to when given"
    )


class BoundedSource(SourceBase):
    """A source that can be read in part."""

    max_documents: int | None = Field(default=None, ge=1, description="stop after this many documents")
    max_characters: int | None = Field(
        default=None, ge=1, description="stop after the document that reaches this many characters"
    )


class StdlibSource(BoundedSource):
    """The standard library of the running Python. Each of its files gives either code or prose, never both."""

    kind: Literal["python_stdlib"] = "python_stdlib"
    part: Literal["code", "prose"] = Field(
        description="code: source files; prose: docstrings and the language reference's topics"
    )


class FilesSource(BoundedSource):
    """The user's own files."""

    kind: Literal["files"] = "files"
    paths: list[str] = context_field(
        why="the content bears identity, through digest; where it lies does not",
        description="files, glob patterns, or fsspec URLs such as s3://bucket/*.parquet; hf_dataset: directories",
        min_length=1,
    )
    format: Literal["auto", "jsonl", "parquet", "text", "hf_dataset"] = Field(
        default="auto",
        description="how to read the files; auto decides by suffix; hf_dataset: a directory written by "
        "datasets.save_to_disk, or of parquet files as on the Hugging Face Hub",
    )
    split: str | None = Field(
        default=None, description="hf_dataset: split to read; null: train, or the only one of a saved Dataset"
    )
    text_field: str = Field(
        default="text", description="field (jsonl) or column (parquet, hf_dataset) that holds a document"
    )

    @model_validator(mode="after")
    def _split_of_a_dataset(self) -> Self:
        if self.split is not None and self.format != "hf_dataset":
            raise ValueError("split: only format hf_dataset has splits")
        return self


class ReasoningSource(SourceBase):
    """Procedural problems with verified answers; never one of the held-out ones."""

    kind: Literal["reasoning"] = "reasoning"
    tasks: list[TaskSpec] = Field(min_length=1, description="families of problems and their difficulties")
    documents: int = Field(ge=1, description="number of documents")
    problems_per_document: int = Field(
        default=4, ge=1, description="problems (in style chat: conversations) in one document"
    )
    style: Literal["plain", "chain_of_thought", "chat"] = Field(
        description="plain: question and answer on a line; chain_of_thought: steps between them; chat: the chat format"
    )
    thinking_share: float = Field(
        default=0.5, ge=0, le=1, description="style chat: share of conversations with detailed thinking on"
    )


Source = Annotated[StdlibSource | FilesSource | ReasoningSource, Field(discriminator="kind")]
