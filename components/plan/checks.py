"""What no phase can say of itself: that later phases ask for what earlier ones give. Before anything is spent; nothing
heavy is imported. The phases check the same again on what they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.plan.target import STAGES
from components.pretrain import stage_model
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError
from ling_flow.evaluation.gate import judge
from ling_flow.evaluation.report import Evaluation, TaskScore
from ling_flow.model.config import ModelConfig
from ling_flow.model.flops import training_flops_per_token
from ling_flow.scaling.law import Interval
from ling_flow.scaling.target import Target, extrapolation_factor, multiple_inside

if TYPE_CHECKING:
    from components.plan import LifecycleConfig


def check_decontamination(config: LifecycleConfig) -> None:
    """
    Raises:
        UserError: the corpus is not rid of the problems that evaluate asks.
    """
    chosen = config.prepare_data.filters.decontamination
    if chosen is None or not chosen.tasks:
        return
    field, asked = "prepare_data.filters.decontamination", config.evaluate
    if chosen.tasks != asked.tasks:
        raise UserError(f"{field}.tasks: must be those of evaluate.tasks, or its problems are not looked for")
    if chosen.seed != asked.seed:
        raise UserError(f"{field}.seed: must be evaluate.seed ({asked.seed}), got {chosen.seed}")
    if chosen.problems < asked.problems:
        raise UserError(
            f"{field}.problems: must be at least evaluate.problems ({asked.problems}), got {chosen.problems}"
        )


def check_vocabulary(config: LifecycleConfig) -> None:
    """
    Raises:
        UserError: a given tokenizer that cannot be read, or models that have fewer token ids than the tokenizer.
    """
    data = config.prepare_data
    size, origin = data.vocab_size, "prepare_data.vocab_size"
    if data.tokenizer is not None:
        size, origin = Tokenizer.load(data.tokenizer).vocab_size, f"token ids of {data.tokenizer}"
    small = [
        f"{phase}.model.vocab_size"
        for phase in type(config).model_fields
        if (model := getattr(getattr(config, phase), "model", None)) is not None and model.vocab_size < size
    ]
    if small:
        raise UserError(f"{', '.join(small)}: must be at least {size} ({origin})")


def check_sweep(config: LifecycleConfig) -> None:
    """
    Raises:
        UserError: the sweep cannot carry a recommendation for the target, even if no trial fails.
    """
    fit, trials = config.fit_scaling_laws, config.wind_tunnel.trials()
    target = Target(float(training_flops_per_token(fit.model, fit.sequence_length).non_embedding), fit.tokens)
    batches = Interval(
        low=min(trial.batch_tokens for trial in trials), high=max(trial.batch_tokens for trial in trials)
    )
    try:
        extrapolation_factor(target, max(trial.compute_flops for trial in trials), fit.allow_extrapolation_factor)
        multiple_inside(batches.low, fit.batch_multiple_tokens, batches)
    except UserError as error:
        raise UserError(f"fit_scaling_laws.{error}") from None


def check_checkpoints(config: LifecycleConfig) -> None:
    """
    Raises:
        UserError: more checkpoints are to be merged than the last stage keeps.
    """
    last_k, kept = config.merge_checkpoints.last_k, config.pretrain_long.checkpoints_kept
    if last_k > kept:
        raise UserError(
            f"merge_checkpoints.last_k: must be at most pretrain_long.checkpoints_kept ({kept}), got {last_k}"
        )


def check_context(config: LifecycleConfig) -> None:
    """
    Raises:
        UserError: a stage reads longer sequences than the YaRN it inherits reaches; or what comes after the stages asks
            for more tokens than the model's context has.
    """
    model: ModelConfig | None = None
    for name in STAGES:
        stage = getattr(config, name)
        model = stage_model(stage, vocab_size=0, eos_id=0, before=model)
        if stage.sequence_length > model.max_position_embeddings:
            raise UserError(
                f"{name}.sequence_length: must be at most {model.max_position_embeddings}, the context of the "
                f"rope_scaling of the stage before, got {stage.sequence_length}"
            )
    assert model is not None
    context = model.max_position_embeddings
    reached = f"the context of {context} tokens that the stages reach"
    length = config.evaluate.validation_sequence_length
    if length > context:
        raise UserError(f"evaluate.validation_sequence_length: must be at most {reached}, got {length}")
    for field, tokens in (
        ("capability_pass.max_new_tokens", config.capability_pass.max_new_tokens),
        ("preference_pass.lpo.max_new_tokens", config.preference_pass.lpo.max_new_tokens),
        ("evaluate.max_new_tokens", config.evaluate.max_new_tokens),
        ("deploy.max_tokens", config.deploy.max_tokens),
    ):
        if tokens >= context:  # how long the questions are, the phases know
            raise UserError(f"{field}: must leave room for a question in {reached}, got {tokens}")


def check_gates(config: LifecycleConfig) -> None:
    """
    Raises:
        UserError: a gate names a metric that the evaluation does not give.
    """
    numbers = [name for name, field in Evaluation.model_fields.items() if field.annotation in (int, float)]
    levels = [(task.name, difficulty) for task in config.evaluate.tasks for difficulty in task.difficulties]
    zeros = dict.fromkeys(("problems", "exact_match_on", "exact_match_off", "chance"), 0)
    example = Evaluation.model_validate(
        {
            **dict.fromkeys(numbers, 0),
            "validation_loss_by_source": {source.name: 0.0 for source in config.prepare_data.sources},
            "tasks": [TaskScore.model_validate({"task": task, "difficulty": level, **zeros}) for task, level in levels],
            "samples": [],
        }
    )
    try:
        judge(config.register.gates, example.metrics())
    except UserError as error:
        raise UserError(f"register.{error}") from None
