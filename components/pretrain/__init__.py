"""Pre-training: one stage of a constant-rate run (WSM); the lifecycle has three, each going on from the one before."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.contracts import check_same_tokenizer
from ling_flow.config import StrictModel, context_field
from ling_flow.errors import UserError
from ling_flow.flow.component import Dataset, Input, Metrics, Model, Output, Resources, Step, component
from ling_flow.model.config import ModelConfig, RouterLoss, Yarn
from ling_flow.scaling.law import Recommendation, ScalingLaw
from ling_flow.training.guard import GuardSettings
from ling_flow.training.retention import Retention
from ling_flow.training.settings import (
    BatchRamp,
    CheckpointIndex,
    FP8Settings,
    OptimizerKind,
    OptimizerSettings,
    Precision,
    StageSettings,
)


class PretrainConfig(StrictModel):
    """One stage of pre-training."""

    stage: str = Field(pattern=r"^[a-z0-9_]+$", description="name of the stage")
    model: ModelConfig = Field(
        description="architecture; its max_position_embeddings is the longest context any stage may reach, tokens"
    )
    tokens: int = Field(gt=0, description="training budget of this stage, tokens")
    sequence_length: int = Field(ge=2, description="tokens per sequence; the model's context grows to it")
    mixture: dict[str, float] = Field(min_length=1, description="sampling weight of each corpus source, in any unit")
    mixture_end: dict[str, float] | None = Field(
        None, description="weights at the end of the stage, to which the shares move linearly; null: constant"
    )
    packing: Literal["windows", "stream", "masked_stream", "best_fit"] = Field(
        "windows",
        description="windows: the corpus as it lies, cut at fixed places that are shuffled; stream: shuffled documents "
        "one after the other, all of a row seen by all of it; masked_stream: documents do not see each other; "
        "best_fit: also whole wherever they fit, the rest of a row padded",
    )
    rope_theta: float | None = Field(
        None, gt=0, description="rotary base from this stage on; null: that of the stage before, or of `model`"
    )
    rope_scaling: Yarn | None = Field(
        None,
        description="YaRN from this stage on, to a context of factor × original; null: that of the stage before, or of "
        "`model`",
    )
    learning_rate: float | None = Field(None, gt=0, description="constant learning rate; null: from the scaling law")
    batch_tokens: int | None = Field(
        None, gt=0, description="tokens per step, rounded to whole sequences; null: from the scaling law"
    )
    batch_tokens_start: int | None = Field(
        None, gt=0, description="tokens of the first step, if batches grow; rounded to whole sequences"
    )
    batch_ramp_tokens: int = Field(0, ge=0, description="tokens over which batches grow linearly to their full size")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up at the start of the first stage")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices")
    gradient_clip: float = Field(1.0, gt=0, description="largest global L2 norm of the gradient")
    optimizer: OptimizerKind = Field(
        "adamw",
        description="adamw8bit: both moments of matrices in 8 bits; muon: for hidden matrices, AdamW for the rest; "
        "stages of one run must agree",
    )
    expert_bias_update_rate: float = Field(
        1e-3, ge=0, description="change of an expert's bias per step; Ling 2.0 goes to 1e-4 when the context grows"
    )
    router_loss: RouterLoss = Field(RouterLoss(), description="optional losses on the routers; Ling 2.0 has none")
    precision: Precision = Field(
        "float32", description="of activations and products; weights, router, loss and optimizer are float32"
    )
    fp8: FP8Settings = Field(FP8Settings(), description="switches of the FP8 recipe, for precision fp8")
    guard: GuardSettings = Field(GuardSettings(), description="which steps are not taken, and when to roll back")
    checkpoints_saved: int = Field(8, gt=0, description="checkpoints written, evenly spaced, the last at the end")
    checkpoints_kept: int = Field(8, gt=0, description="newest checkpoints kept, for the merge")
    checkpoints_kept_every: int = Field(
        0, ge=0, description="every n-th checkpoint, counted from the first, is kept too; 0: none"
    )
    validation_tokens: int = Field(16384, gt=0, description="validation tokens, per source")
    evaluations: int = Field(
        0,
        ge=0,
        description="evaluations within the stage, evenly spaced: validation loss per source and a sample of each",
    )
    tokens_per_forward: int = Field(
        16384, gt=0, description="tokens per forward pass, which bounds memory; larger batches accumulate gradients"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of initial weights and data order")
    recompute: bool = context_field(
        False,
        why="computing activations a second time gives the same bits",
        description="keep only each layer's input in training and compute the rest again: less memory, more time",
    )
    resumable_checkpoints: int = context_field(
        2,
        why="a finished stage has one, whatever this says",
        description="newest checkpoints with training state while the stage runs: one to resume from, others to fall "
        "back on",
        gt=0,
    )
    failures_per_day: float | None = context_field(
        None,
        why="saving more often changes no bit, and not which checkpoints are kept",
        description="failures expected per day; between the planned checkpoints more are then saved to resume from, at "
        "the interval that costs least by the measured cost of a save; null: only the planned ones",
        gt=0,
    )
    watts: float | None = context_field(
        None,
        why="what a machine draws is told, not computed with",
        description="power of the training device, watts, for an estimate of the energy; null: none",
        gt=0,
    )
    workers: int = context_field(
        1,
        why="workers divide a batch, not the numbers; bits are equal for equal numbers of workers",
        description="data-parallel workers, each with a whole model; with GPUs, one GPU each",
        gt=0,
    )
    run_on: Literal["processes", "ray"] = context_field(
        "processes",
        why="who starts the workers changes no bit",
        description="processes of this machine; or Ray Train, on the cluster at RAY_ADDRESS, else on a local Ray",
    )
    restarts: int = context_field(
        3,
        why="a restarted run ends with the bits of an unbroken one",
        description="times that Ray Train starts the workers again when one dies, before the step fails",
        ge=0,
    )
    ray_storage: str | None = context_field(
        None,
        why="no result is kept there",
        description="path or fsspec URL, seen by all nodes, for what Ray Train notes while it runs (no checkpoints); "
        "null: below the artifact root",
    )
    threads: int | None = context_field(
        None,
        why="how many cores a machine lends does not change the method; bits are equal for equal numbers of threads",
        description="CPU threads of each worker; null: one per core, divided among the workers",
        gt=0,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field, mixture in (("mixture", self.mixture), ("mixture_end", self.mixture_end)):
            if mixture is not None and (any(w < 0 for w in mixture.values()) or not sum(mixture.values()) > 0):
                raise ValueError(f"{field}: weights must be 0 or more and not all 0, got {mixture}")
        if self.router_loss.balance > 0 and self.router_loss.balance_over == "batch" and self.workers > 1:
            raise ValueError(
                f"router_loss.balance_over: batch is over the rows of one worker; {self.workers} would change the "
                "result: use sequence, or workers 1"
            )
        if self.mixture_end is not None and self.packing == "windows":
            raise ValueError("mixture_end needs packing stream, masked_stream or best_fit, got windows")
        if (self.batch_tokens_start is None) != (self.batch_ramp_tokens == 0):
            raise ValueError("batch_tokens_start and batch_ramp_tokens must be given together")
        if self.batch_ramp_tokens > self.tokens:
            raise ValueError(f"batch_ramp_tokens must be at most tokens ({self.tokens}), got {self.batch_ramp_tokens}")
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length must be at most model.max_position_embeddings "
                f"({self.model.max_position_embeddings}), got {self.sequence_length}"
            )
        if self.rope_scaling is not None:
            reach = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
            if not self.sequence_length <= reach <= self.model.max_position_embeddings:
                raise ValueError(
                    f"rope_scaling: factor × original_max_position_embeddings is {reach}; it must be at least "
                    f"sequence_length ({self.sequence_length}) and at most model.max_position_embeddings "
                    f"({self.model.max_position_embeddings})"
                )
        if self.checkpoints_kept > self.checkpoints_saved:
            saved, kept = self.checkpoints_saved, self.checkpoints_kept
            raise ValueError(f"checkpoints_kept must be at most checkpoints_saved ({saved}), got {kept}")
        if self.model.torch_dtype != "float32":
            raise ValueError(
                f"model.torch_dtype must be 'float32', got {self.model.torch_dtype!r}: "
                "bfloat16 weights are too coarse for the optimizer's steps (see `precision`)"
            )
        return self


class PretrainResult(StrictModel):
    """What the stage reached."""

    validation_loss: float = Field(description="next-token cross-entropy weighted by the mixture, nats per token")
    tokens_per_second: float = Field(description="training speed over the stage, tokens per second")
    steps: int = Field(description="optimizer steps of this stage")
    tokens: int = Field(description="tokens of this stage, padding left out")
    total_tokens: int = Field(description="tokens since the start of the run, over all stages")
    learning_rate: float = Field(description="constant learning rate")
    batch_tokens: int = Field(description="tokens per step")
    load_violation: float = Field(description="max/mean - 1 of the experts' token counts, last step, mean of layers")
    skipped_steps: int = Field(description="steps without an update: spikes of loss or gradient")


@component(
    version=4,
    resources=Resources(cpus=2, memory_gib=4),
    resumable=True,
    label=lambda config: f"pretrain_{config.stage}",
    runs_on=lambda config: "ray" if config.run_on == "ray" else "job",
)
def pretrain(
    config: PretrainConfig,
    corpus: Input[Dataset],
    scaling_law: Input[Metrics],
    checkpoints: Output[Model],
    step: Step,
    previous: Input[Model] | None = None,
) -> PretrainResult:
    """Train one stage at a constant learning rate and keep its last checkpoints; resumes bit for bit after a kill."""
    settings = stage_settings(config, ScalingLaw.load(scaling_law.path).recommendation)
    source = None
    if previous is not None:
        check_same_tokenizer(previous, corpus)
        source = previous.path / CheckpointIndex.load(previous.path).latest

    import torch

    from components.pretrain.worker import Job, train_stage
    from ling_flow.model.hf import read_config
    from ling_flow.training.stopping import sigterm_noticed

    threads = config.threads or max(1, torch.get_num_threads() // config.workers)
    job = Job(config, settings, corpus.path, checkpoints.path, source, threads)
    result: PretrainResult | None
    if config.run_on == "ray":
        from components.pretrain.ray_train import RayRun, train_on_ray

        fingerprint = checkpoints.path.parent.stem
        storage = config.ray_storage or str(step.root / ".ray_train")
        result = train_on_ray(job, RayRun(f"pretrain-{fingerprint}", storage, config.workers, config.restarts), step)
    elif config.workers > 1:
        from components.pretrain.processes import train_in_processes

        result = train_in_processes(job, config.workers, step)
    else:
        result = train_stage(job, step, sigterm_noticed())
    assert result is not None  # that of the first worker
    newest = read_config(checkpoints.path / CheckpointIndex.load(checkpoints.path).latest)
    checkpoints.contract.update(
        corpus.contract, context_length=newest.max_position_embeddings, precision=newest.torch_dtype
    )
    return result


def stage_settings(config: PretrainConfig, recommendation: Recommendation) -> StageSettings:
    """What the loop is told; learning rate and batch come from the law where the config leaves them open.

    Raises:
        UserError: the budget is too small for the checkpoints to keep.
    """
    wanted = config.batch_tokens or recommendation.batch_tokens
    sequences = max(1, round(wanted / config.sequence_length))
    ramp, ramp_tokens = None, 0
    if config.batch_tokens_start is not None:
        at_start = max(1, round(config.batch_tokens_start / config.sequence_length))
        # The mean batch of the ramp is half way between its ends.
        ramp_steps = max(1, round(2 * config.batch_ramp_tokens / ((at_start + sequences) * config.sequence_length)))
        ramp = BatchRamp(sequences_at_start=at_start, steps=ramp_steps)
        ramp_tokens = (at_start + sequences) * config.sequence_length * ramp_steps // 2
    full = max(0, config.tokens - ramp_tokens) // (sequences * config.sequence_length)
    steps = full + (ramp.steps if ramp is not None else 0)
    if steps < config.checkpoints_kept:
        raise UserError(
            f"pretrain.tokens: {config.tokens} make {steps} steps of {sequences * config.sequence_length} tokens, "
            f"fewer than checkpoints_kept ({config.checkpoints_kept}); raise it, or lower batch_tokens"
        )
    return StageSettings(
        stage=config.stage,
        steps=steps,
        sequence_length=config.sequence_length,
        sequences_per_batch=sequences,
        batch_ramp=ramp,
        sequences_per_forward=max(1, config.tokens_per_forward // config.sequence_length),
        optimizer=OptimizerSettings(
            learning_rate=config.learning_rate or recommendation.learning_rate,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
            optimizer=config.optimizer,
        ),
        warmup_steps=config.warmup_steps,
        expert_bias_update_rate=config.expert_bias_update_rate,
        router_loss=config.router_loss,
        precision=config.precision,
        fp8=config.fp8,
        guard=config.guard,
        checkpoints_saved=config.checkpoints_saved,
        retention=Retention(
            window=config.checkpoints_kept,
            every=config.checkpoints_kept_every,
            resume=config.resumable_checkpoints,
        ),
    )


def stage_model(config: PretrainConfig, vocab_size: int, eos_id: int, before: ModelConfig | None) -> ModelConfig:
    """The model of this stage: context as long as any stage so far needed, special tokens of the corpus's tokenizer.

    Args:
        vocab_size, eos_id: of the corpus's tokenizer.
        before: the model of the stage before; None for the first.

    Raises:
        UserError: the model has fewer token ids than the corpus.
    """
    if config.model.vocab_size < vocab_size:
        got = config.model.vocab_size
        raise UserError(f"pretrain.model.vocab_size: must be at least that of the corpus ({vocab_size}), got {got}")
    inherited = before or config.model
    yarn = config.rope_scaling or inherited.rope_scaling
    context_before = 0 if before is None else before.max_position_embeddings
    reach = 0 if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings)
    return config.model.model_copy(
        update={
            "max_position_embeddings": reach or max(config.sequence_length, context_before),
            "rope_scaling": yarn,
            "rope_theta": config.rope_theta or inherited.rope_theta,
            "eos_token_id": eos_id,
            "pad_token_id": eos_id,
        }
    )
