"""The WSM merge: the mean of a stage's last checkpoints in place of a learning-rate decay."""

from __future__ import annotations

from pydantic import Field

from components.contracts import check_same_tokenizer
from ling_flow.config import StrictModel, context_field
from ling_flow.errors import UserError
from ling_flow.flow.component import Dataset, Input, Model, Output, Resources, Step, component
from ling_flow.merging.weights import CurveName, merge_weights
from ling_flow.training.settings import CheckpointIndex


class MergeCheckpointsConfig(StrictModel):
    """What to merge, and how."""

    last_k: int = Field(8, gt=0, description="newest checkpoints to merge")
    curve: CurveName = Field("mean", description="decay of the learning rate that the merge stands in for")
    compare_curve: CurveName | None = Field(
        "1-sqrt", description="second curve whose validation loss is tracked beside the first; null: none"
    )
    validation_tokens: int = Field(16384, gt=0, description="validation tokens, per source")
    threads: int | None = context_field(
        None,
        why="how many cores a machine lends does not change the method",
        description="CPU threads; null: one per core",
        gt=0,
    )


class MergeCheckpointsResult(StrictModel):
    """Losses are next-token cross-entropies weighted by the last stage's mixture, nats per token."""

    validation_loss_merged: float = Field(description="of the merged model, nats per token")
    validation_loss_last: float = Field(description="of the newest checkpoint, nats per token")
    validation_loss_best_single: float = Field(description="of the best of the merged checkpoints, nats per token")
    merged_checkpoints: int = Field(description="checkpoints merged")


@component(version=1, resources=Resources(cpus=2, memory_gib=4), runs_on="job")
def merge_checkpoints(
    config: MergeCheckpointsConfig, checkpoints: Input[Model], corpus: Input[Dataset], model: Output[Model], step: Step
) -> MergeCheckpointsResult:
    """Merge the last checkpoints of a constant-rate run and compare the merge with each of them on validation data."""
    index = CheckpointIndex.load(checkpoints.path)
    chosen = index.checkpoints[-config.last_k :]
    if len(chosen) < config.last_k:
        raise UserError(
            f"merge_checkpoints.last_k: {config.last_k} asked for, but {checkpoints.ref} kept {len(chosen)}; "
            "lower it or raise checkpoints_kept of that stage"
        )
    check_same_tokenizer(checkpoints, corpus)

    import tempfile
    from pathlib import Path

    import torch

    from ling_flow.data.corpus import Corpus
    from ling_flow.merging.merge import merge_checkpoints as merge
    from ling_flow.model.hf import load_pretrained
    from ling_flow.training.evaluate import mixture_loss, validation_loss

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    opened = Corpus.open(corpus.path)
    paths = [checkpoints.path / entry.directory for entry in chosen]
    sources = [name for name, weight in index.mixture.items() if weight > 0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done, total = 0, len(paths) + (2 if config.compare_curve else 1)

    def loss_of(path: Path, text: str) -> float:
        nonlocal done
        single = load_pretrained(path).to(device)
        losses = validation_loss(single, opened, index.sequence_length, config.validation_tokens, sources=sources)
        loss = mixture_loss(losses, index.mixture)
        done += 1
        step.progress(done, total, text, validation_loss=loss)
        return loss

    singles = []
    for path, entry in zip(paths, chosen, strict=True):
        singles.append(loss_of(path, entry.directory))
        step.metrics({"validation_loss_single": singles[-1]}, step=entry.step)
    last_step = chosen[-1].step
    merge(paths, merge_weights(config.curve, len(paths)), model.path)
    merged = loss_of(model.path, f"merged, {config.curve}")
    step.metrics({f"validation_loss_merged/{config.curve}": merged}, step=last_step)
    if config.compare_curve:
        with tempfile.TemporaryDirectory() as scratch:
            other = Path(scratch) / "merged"
            merge(paths, merge_weights(config.compare_curve, len(paths)), other)
            compared = loss_of(other, f"merged, {config.compare_curve}")
        step.metrics({f"validation_loss_merged/{config.compare_curve}": compared}, step=last_step)
    model.contract.update(checkpoints.contract)
    return MergeCheckpointsResult(
        validation_loss_merged=merged,
        validation_loss_last=singles[-1],
        validation_loss_best_single=min(singles),
        merged_checkpoints=len(paths),
    )
