"""Evaluate: held-out problems with thinking and without, well-formedness, validation loss; as data and as a page."""

from __future__ import annotations

from pydantic import Field

from components.contracts import check_same_tokenizer
from components.problems import TASKS
from ling_flow.config import StrictModel, context_field
from ling_flow.data.reasoning import TaskSpec
from ling_flow.flow.component import HTML, Dataset, Input, Metrics, Model, Output, Resources, Step, component
from ling_flow.flow.identity import fingerprint


class EvaluateConfig(StrictModel):
    """What is measured."""

    tasks: tuple[TaskSpec, ...] = Field(TASKS, min_length=1, description="families of problems and their difficulties")
    problems: int = Field(300, ge=1, description="held-out problems, each asked with thinking and without")
    max_new_tokens: int = Field(128, ge=1, description="longest answer, tokens")
    validation_sequence_length: int = Field(128, ge=1, description="tokens per window of the validation loss")
    validation_tokens: int = Field(20_000, ge=1, description="validation tokens per source")
    seed: int = Field(1, ge=0, lt=2**32, description="seed that draws the problems")
    threads: int | None = context_field(
        None,
        why="how many cores a machine lends does not change the method; bits are equal for equal numbers of threads",
        description="CPU threads; null: one per core",
        gt=0,
    )


class EvaluateResult(StrictModel):
    """What the model can do; answers are decoded greedily."""

    exact_match_thinking_on: float = Field(description="share of right answers with thinking, 0 to 1")
    exact_match_thinking_off: float = Field(description="share of right answers without, 0 to 1")
    exact_match_easiest: float = Field(description="share of right answers to the easiest problems, both modes, 0 to 1")
    chance_easiest: float = Field(description="the same of always giving each task's most common answer, 0 to 1")
    well_formed: float = Field(
        description="share of answers that stop, keep to the mode asked for, and can be read, 0 to 1"
    )
    thinking_switch_obeyed: float = Field(
        description="share of answers with a thinking block exactly where asked for, 0 to 1"
    )
    validation_loss: float = Field(description="mean cross-entropy over the sources' validation parts, nats per token")
    problems: int = Field(description="held-out problems asked")


@component(version=3, resources=Resources(cpus=2, memory_gib=4), runs_on="job")
def evaluate(
    config: EvaluateConfig,
    model: Input[Model],
    corpus: Input[Dataset],
    metrics: Output[Metrics],
    report: Output[HTML],
    step: Step,
) -> EvaluateResult:
    """Measure a model on held-out problems, with thinking and without, and its validation loss."""
    check_same_tokenizer(model, corpus)
    from statistics import fmean

    import torch

    from ling_flow.data.corpus import Corpus
    from ling_flow.data.reasoning import problems
    from ling_flow.evaluation.report import evaluation_of, html_page
    from ling_flow.evaluation.tasks import ask, both_modes
    from ling_flow.model.hf import load_pretrained
    from ling_flow.training.evaluate import validation_loss

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    opened = Corpus.open(corpus.path)
    network = load_pretrained(model.path).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    questions = both_modes(problems(config.tasks, config.problems, config.seed, "held_out"))
    total = len(questions) + 1
    answers = ask(
        network,
        opened.tokenizer,
        questions,
        max_new_tokens=config.max_new_tokens,
        temperature=0.0,
        seed=config.seed,
        on_progress=lambda done, _: step.progress(done, total, "held-out problems"),
    )
    losses = validation_loss(network, opened, config.validation_sequence_length, config.validation_tokens)
    evaluation = evaluation_of(answers, fmean(losses.values()), losses)
    (metrics.path / "evaluation.json").write_text(evaluation.model_dump_json(indent=2) + "\n")
    # Figures of two models are compared where method and corpus were the same.
    metrics.contract["asked"] = fingerprint("evaluate", evaluate.version, config, {"corpus": corpus.fingerprint})
    (report.path / "index.html").write_text(html_page(evaluation, f"Evaluation of {model.fingerprint}"))
    step.metrics(evaluation.metrics(), step=0)
    step.progress(total, total, "validation loss")
    return EvaluateResult(**{name: getattr(evaluation, name) for name in EvaluateResult.model_fields})
