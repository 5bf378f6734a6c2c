"""`lingflow job`: one component as a job on a Ray cluster that runs already."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ling_flow.errors import RemoteDefect, UserError

if TYPE_CHECKING:
    from ling_flow.flow.component import Component


@click.command()
@click.argument("component")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML with its config.")
@click.option("--set", "assignments", multiple=True, metavar="FIELD=VALUE", help="Override one field; repeatable.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=REF", help="An artifact it reads; repeatable.")
@click.option(
    "--root", metavar="ROOT", help="Artifact root, path or URL, as the job sees it.  [default: LING_FLOW_ARTIFACTS]"
)
@click.option("--rebuild", is_flag=True, help="Redo the step although its artifact exists.")
@click.option("--address", envvar="RAY_ADDRESS", help="The job server, http://HOST:8265.  [default: RAY_ADDRESS]")
@click.option("--working-dir", type=click.Path(path_type=Path), help="Upload this directory as the job's code.")
@click.option("--no-wait", is_flag=True, help="Print the submission id and leave the job running.")
@click.option("--json", "as_json", is_flag=True, help="Last line of standard output: one JSON object.")
def job(
    component: str,
    config_file: Path | None,
    assignments: Sequence[str],
    inputs: Sequence[str],
    root: str | None,
    rebuild: bool,
    address: str | None,
    working_dir: Path | None,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Run COMPONENT as a job on the Ray cluster at ADDRESS, and wait for it.

    The job's output is streamed, and its exit code returned. Ctrl-C stops the job; a killed terminal does not, and the
    same command attaches to the job that still runs. A finished step is not run again.
    """
    from ling_flow.config import merge, parse, parse_overrides, read_yaml
    from ling_flow.flow.cli_face import as_json as outcome_json
    from ling_flow.flow.cli_face import as_table
    from ling_flow.flow.job_settings import JobSettings
    from ling_flow.flow.step import exit_on_sigterm, run_step

    chosen = find_component(component)
    tree = merge(read_yaml(config_file) if config_file else {}, parse_overrides(assignments))
    config = chosen.parse_config(tree)
    given = _inputs(inputs)
    if address:
        os.environ["RAY_ADDRESS"] = address
    if working_dir is not None:
        settings = parse(JobSettings, os.environ.get("LING_FLOW_JOB") or "{}", "LING_FLOW_JOB")
        uploading = settings.model_copy(update={"working_dir": working_dir.absolute()})
        os.environ["LING_FLOW_JOB"] = uploading.model_dump_json(exclude_unset=True)
    if no_wait:
        _leave_running(chosen, config, given, root, rebuild, as_json)
        return
    exit_on_sigterm()
    try:
        outcome = run_step(chosen, config, given, root=root, rebuild=rebuild, run_on="ray-job")
    except RemoteDefect as error:
        click.echo(error.traceback, err=True, nl=False)
        raise
    click.echo(outcome_json(outcome) if as_json else as_table(outcome))


def find_component(name: str) -> Component:
    """`pretrain`, or `module:name` for one that is not among ours.

    Raises:
        UserError: there is none of that name.
    """
    from ling_flow.flow.kfp_face import component_names, load_component

    if ":" in name:
        return load_component(name)
    known = component_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
        raise UserError(f"COMPONENT: no component called '{name}'; {advice}")
    return load_component(f"components.{name}:{name}")


def _inputs(assignments: Sequence[str]) -> dict[str, str | Path | None]:
    given: dict[str, str | Path | None] = {}
    for assignment in assignments:
        name, equals, ref = assignment.partition("=")
        if not equals or not name or not ref:
            raise UserError(f"--input {assignment}: expected NAME=ROOT/COMPONENT/FINGERPRINT/OUTPUT")
        given[name] = ref
    return given


def _leave_running(
    component: Component, config: Any, inputs: dict[str, Any], root: str | None, rebuild: bool, as_json: bool
) -> None:
    from ling_flow.config import parse
    from ling_flow.flow import ray_jobs
    from ling_flow.flow.context import Context
    from ling_flow.flow.job_settings import JobSettings
    from ling_flow.flow.jobs import job_of
    from ling_flow.flow.step import identify

    context = Context.from_environment()
    step = identify(component, config, inputs, root, context)
    found = None if rebuild else step.find()
    submitted = None
    if found is None:
        settings = parse(JobSettings, context.job, "LING_FLOW_JOB")
        client = ray_jobs.connect(ray_jobs.job_server())
        submitted = ray_jobs.submit(client, job_of(step, context, settings, rebuild), settings)
    if as_json:
        click.echo(json.dumps({"submission_id": submitted, "fingerprint": step.key, "cached": found is not None}))
    else:
        click.echo(submitted or f"already done: {step.key}")
