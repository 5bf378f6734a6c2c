"""Register: a version in the model registry, judged by gates and, if it passes them all, promoted to champion."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ling_flow.config import StrictModel, parse
from ling_flow.errors import UserError
from ling_flow.evaluation.gate import Gate, GateVerdict
from ling_flow.flow.artifact import ArtifactStore, Ref
from ling_flow.flow.component import Input, Metrics, Model, Output, Resources, Step, component

DEFAULT_GATES = (
    Gate(metric="well_formed", threshold=0.5, min_change=-0.1),
    Gate(metric="thinking_switch_obeyed", threshold=0.5, min_change=-0.1),
)


class RegisterConfig(StrictModel):
    """Under which name, and what it takes to become champion."""

    model_name: str = Field("ling-tiny", pattern=r"^[A-Za-z0-9_-]+$", description="registered model")
    gates: tuple[Gate, ...] = Field(DEFAULT_GATES, min_length=1, description="what the evaluation must show")


class RegisterResult(StrictModel):
    """The version and what became of it."""

    model_name: str = Field(description="registered model")
    version: int = Field(description="version number")
    fingerprint: str = Field(description="fingerprint of the model's artifact")
    gate_passed: bool = Field(description="whether every gate was passed")
    promoted: bool = Field(description="whether the version is the champion now")
    champion_version: int = Field(description="version that is champion now, 0 where there is none")
    verdict: str = Field(description="the gates' verdicts in sentences")


class Registration(StrictModel):
    """What `registration.json` holds."""

    model_name: str = Field(description="registered model")
    version: int = Field(description="version number")
    model_uri: str = Field(description="models:/<name>/<version>")
    fingerprint: str = Field(description="fingerprint of the model's artifact")
    artifact: str = Field(description="reference of the model")
    champion_version: int = Field(description="version that is champion now, 0 where there is none")
    verdicts: tuple[GateVerdict, ...] = Field(description="one for each gate")


def _still_registered(config: RegisterConfig, result: RegisterResult, root: Path) -> bool:
    """The version is still there for the same artifact, and the champion is still the one recorded."""
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry

    registry = Registry.of(Context.from_environment())
    version = registry.version(result.model_name, result.version)
    champion = registry.by_alias(result.model_name, "champion")
    return (
        version is not None
        and version.fingerprint == result.fingerprint
        and (champion.number if champion else 0) == result.champion_version
    )


def _check_measured_on(model: Input[Model], metrics: Input[Metrics], cache: Path) -> None:
    """An evaluation of one's own may take the model under another name; then nothing is known.

    Raises:
        UserError: the metrics were measured on another model.
    """
    of, made = Ref.parse(metrics.ref), Ref.parse(model.ref)
    manifest = ArtifactStore(of.root, cache).manifest(of.component, of.fingerprint)
    measured = manifest.inputs.get("model") if manifest else None
    if measured is not None and measured.fingerprint != f"{made.fingerprint}/{made.output}":
        raise UserError(
            f"metrics: {metrics.ref} was measured on {measured.ref}, not on {model.ref}; evaluate the model that is to "
            "be registered"
        )


@component(version=2, resources=Resources(cpus=1, memory_gib=1), still_valid=_still_registered)
def register(
    config: RegisterConfig, model: Input[Model], metrics: Input[Metrics], registration: Output[Metrics], step: Step
) -> RegisterResult:
    """Register a model as candidate, judge it against its gates and the champion, and promote it if it passes."""
    from ling_flow.evaluation.gate import judge
    from ling_flow.evaluation.report import Evaluation
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry

    evaluation = parse(Evaluation, metrics.read_json("evaluation.json"), f"{metrics.ref}/evaluation.json").metrics()
    context = Context.from_environment()
    _check_measured_on(model, metrics, context.home / "cache")
    registry = Registry.of(context)
    judge(config.gates, evaluation)  # a gate on a metric that is not there: nothing shall be registered

    architecture = model.read_json("config.json")
    version = registry.register(
        config.model_name,
        model.ref,
        model.fingerprint,
        evaluation,
        architecture,
        config.gates,
        asked=str(metrics.contract.get("asked", "")),
    )
    decision = registry.promote(version, config.gates)
    champion = registry.by_alias(config.model_name, "champion")
    for sentence in decision.sentences:
        step.log(sentence)

    record = Registration(
        model_name=version.name,
        version=version.number,
        model_uri=version.uri,
        fingerprint=version.fingerprint,
        artifact=version.artifact,
        champion_version=champion.number if champion else 0,
        verdicts=tuple(decision.verdicts),
    )
    (registration.path / "registration.json").write_text(record.model_dump_json(indent=2) + "\n")
    return RegisterResult(
        model_name=version.name,
        version=version.number,
        fingerprint=version.fingerprint,
        gate_passed=all(verdict.passed for verdict in decision.verdicts),
        promoted=champion is not None and champion.number == version.number,
        champion_version=record.champion_version,
        verdict="; ".join(decision.sentences),
    )
