"""A corpus and a model small enough to train in a second."""

import random
from pathlib import Path

from ling_flow.data.build import build_corpus
from ling_flow.data.corpus import Corpus
from ling_flow.data.sources import FilesSource
from ling_flow.model.config import ModelConfig
from ling_flow.training.retention import Retention
from ling_flow.training.settings import OptimizerSettings, StageSettings

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "red", "house", "with", "one", "old", "hat"]


def write_texts(directory: Path, name: str, seed: int, documents: int = 150) -> FilesSource:
    """A source of small documents with some structure to learn."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines = [
        " ".join(f"{rng.choice(WORDS)} {i + j}" if seed % 2 else rng.choice(WORDS) for j in range(12))
        for i in range(documents)
    ]
    path = directory / f"{name}.jsonl"
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return FilesSource(name=name, paths=[str(path)], format="jsonl")


def make_corpus(directory: Path) -> Corpus:
    """Two sources, `words` and `numbers`."""
    sources = [write_texts(directory, "words", 0), write_texts(directory, "numbers", 1)]
    return build_corpus(
        directory / "corpus", sources, vocab_size=280, validation_share=0.1, tokenizer_characters=5000, seed=0
    )


def micro_model(**changes) -> ModelConfig:
    """2 layers, one of them sparse, and an MTP layer; about 50 thousand parameters."""
    fields = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    return ModelConfig(**{**fields, **changes})


def stage_settings(**changes) -> StageSettings:
    fields = {
        "stage": "short",
        "steps": 6,
        "sequence_length": 16,
        "sequences_per_batch": 4,
        "sequences_per_forward": 4,
        "optimizer": OptimizerSettings(learning_rate=3e-3),
        "warmup_steps": 2,
        "expert_bias_update_rate": 1e-3,
        "checkpoints_saved": 3,
        "retention": Retention(window=2),
    }
    return StageSettings(**{**fields, **changes})
