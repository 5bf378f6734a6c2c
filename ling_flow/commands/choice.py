"""Which DAG with which parameters: the options that run, plan and submit share, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ling_flow.errors import UserError

if TYPE_CHECKING:
    from ling_flow.flow.dag import LoadedDag, Node

_CONFIG_FILE_KEYS = ("preset", "seed")


def dag_options(command: Any) -> Any:
    """The options that choose a DAG and its parameters; shared by run, plan and compile."""
    for option in (
        click.argument("dag", default="lifecycle"),
        click.option(
            "--preset", help="Named sizes: tiny, small; for plan also mini, flash, one_t. [default: the DAG's own]"
        ),
        click.option("--seed", type=int, help="Seed of data order, initial weights, sampling."),
        click.option(
            "--set", "assignments", multiple=True, metavar="PHASE.FIELD=VALUE", help="Override one field; repeatable."
        ),
        click.option(
            "--config", "config_file", type=click.Path(), help="YAML with preset, seed, and overrides by phase."
        ),
    ):
        command = option(command)
    return command


def choose(
    dag: str, preset: str | None, seed: int | None, assignments: Sequence[str], config_file: str | None
) -> tuple[LoadedDag, dict[str, Any]]:
    """The DAG and its arguments: the file first, the command line over it."""
    from ling_flow.config import merge, parse_overrides, read_yaml
    from ling_flow.flow.dag import load_dag, pipeline_arguments

    overrides = read_yaml(Path(config_file)) if config_file else {}
    given: dict[str, Any] = {key: overrides.pop(key) for key in _CONFIG_FILE_KEYS if key in overrides}
    given |= {name: value for name, value in {"preset": preset, "seed": seed}.items() if value is not None}
    overrides = merge(overrides, parse_overrides(assignments))
    if overrides:
        try:
            given["overrides"] = json.dumps(overrides, sort_keys=True, allow_nan=False)
        except ValueError:
            raise UserError(f"{config_file}: holds inf or nan; all numbers must be finite") from None
    loaded = load_dag(dag)
    return loaded, pipeline_arguments(loaded, given)


def make_nodes(
    loaded: LoadedDag, arguments: dict[str, Any], rebuild: frozenset[str], will_run: bool = False
) -> list[Node]:
    """The plan with this machine's artifacts: what is cached, what would run."""
    from ling_flow.flow.artifact import ArtifactStore
    from ling_flow.flow.context import Context
    from ling_flow.flow.dag import make_plan
    from ling_flow.flow.preflight import check_access

    context = Context.from_environment()
    _lint(loaded, arguments)
    for away in check_access(context, write=will_run):
        click.echo(f"warning: {away}", err=True)
    return make_plan(loaded, arguments, ArtifactStore(context.artifacts, context.home / "cache"), rebuild)


def validate(loaded: LoadedDag, arguments: dict[str, Any]) -> list[Node]:
    """The plan for a run elsewhere: every config and edge is checked, and no artifact is looked for.

    Raises:
        UserError: a config is wrong.
    """
    import tempfile

    from ling_flow.flow.artifact import ArtifactStore
    from ling_flow.flow.dag import make_plan

    _lint(loaded, arguments)
    with tempfile.TemporaryDirectory() as empty:
        return make_plan(loaded, arguments, ArtifactStore(empty, Path(empty)), frozenset())


def _lint(loaded: LoadedDag, arguments: dict[str, Any]) -> None:
    from ling_flow.flow.lint import lint

    for finding in lint(loaded.spec, loaded.pipeline, arguments):
        if finding.where != "kfp":
            if finding.severity == "error":
                raise UserError(str(finding).removeprefix("error: "))
            click.echo(str(finding), err=True)
