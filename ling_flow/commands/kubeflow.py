"""`lingflow compile`, `submit` and `runs`: DAGs on Kubeflow Pipelines."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ling_flow.commands.choice import choose, dag_options, validate
from ling_flow.errors import UserError

if TYPE_CHECKING:
    from ling_flow.flow.kubeflow import Kubeflow, Run
    from ling_flow.flow.profile import Profile

_PROFILE_HELP = "Where and how the steps run: a name in infra/profiles, or a YAML file."
_HOST_HELP = "URL of Kubeflow Pipelines.  [default: KFP_HOST, then the profile's kfp.host]"


@click.command("compile")
@click.argument("dag", default="lifecycle")
@click.option("--profile", metavar="NAME", help=_PROFILE_HELP)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="File for KFP's IR YAML.")
def compile_dag(dag: str, profile: str | None, output: str) -> None:
    """Write DAG as IR YAML that Kubeflow Pipelines takes.

    With --profile, images, resources, secrets' names, retries and the exit handler are in it.
    """
    from ling_flow.flow.dag import compile_to, load_dag
    from ling_flow.flow.profile import read_profile

    chosen = read_profile(profile) if profile else None
    compile_to(load_dag(dag), Path(output), chosen, profile or "")
    click.echo(f"wrote {output}", err=True)


@click.command()
@dag_options
@click.option("--profile", required=True, metavar="NAME", help=_PROFILE_HELP)
@click.option("--host", envvar="KFP_HOST", metavar="URL", help=_HOST_HELP)
@click.option("--experiment", metavar="NAME", help="Where the run is listed.  [default: the profile's]")
@click.option("--run-name", metavar="NAME", help="[default: DAG, preset and time]")
@click.option("--wait", is_flag=True, help="Follow the run to its end; exit code 0, 1 (failed), 130 (canceled).")
@click.option("--json", "as_json", is_flag=True, help="Last line of standard output: one JSON object.")
def submit(
    dag: str,
    preset: str | None,
    seed: int | None,
    assignments: Sequence[str],
    config_file: str | None,
    profile: str,
    host: str | None,
    experiment: str | None,
    run_name: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Run DAG on Kubeflow Pipelines (default: lifecycle).

    Every config is checked before anything is sent. A token is taken from KFP_TOKEN. Finished steps are served from the
    profile's artifacts, so that the same command goes on where a failed run ended.
    """
    from ling_flow.flow.dag import compile_to
    from ling_flow.flow.profile import read_profile

    chosen = read_profile(profile)
    loaded, arguments = choose(dag, preset, seed, assignments, config_file)
    validate(loaded, arguments)
    name = run_name or "-".join(
        part for part in (loaded.name, str(arguments.get("preset") or ""), f"{datetime.now(UTC):%Y%m%d-%H%M%S}") if part
    )
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory) / f"{loaded.name}.yaml"
        compile_to(loaded, package, chosen, profile)
        server = _server(host, chosen)
        submitted = server.submit(
            package,
            loaded.spec["pipelineInfo"]["name"],
            arguments,
            experiment or chosen.kfp.experiment,
            name,
            chosen.kfp.service_account,
            chosen.kfp.pipeline_root,
        )
    run = submitted.run
    click.echo(f"{name}: version {submitted.version} of {submitted.pipeline}, in {submitted.experiment}", err=True)
    click.echo(run.link, err=as_json)
    if wait:
        run = _follow(server, run)
    if as_json:
        facts = {"pipeline": submitted.pipeline, "version": submitted.version, "experiment": submitted.experiment}
        click.echo(json.dumps({**dataclasses.asdict(run), **facts}))
    if wait:
        _judge(run)


@click.command()
@click.option("--experiment", metavar="NAME", help="Only its runs.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="So many, the newest first.")
@click.option("--profile", metavar="NAME", help="Whose server and namespace.")
@click.option("--host", envvar="KFP_HOST", metavar="URL", help=_HOST_HELP)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def runs(experiment: str | None, limit: int, profile: str | None, host: str | None, as_json: bool) -> None:
    """List runs on Kubeflow Pipelines."""
    from ling_flow.flow.profile import read_profile

    server = _server(host, read_profile(profile) if profile else None)
    found = server.runs(experiment, limit)
    if as_json:
        click.echo(json.dumps({"runs": [dataclasses.asdict(run) for run in found]}))
        return
    for run in found:
        click.echo(f"{run.created[:19]:19}  {run.state:9}  {run.name}  {run.link}")
    if not found:
        click.echo("no runs", err=True)


def _server(host: str | None, profile: Profile | None) -> Kubeflow:
    from ling_flow.flow.kubeflow import TOKEN, Kubeflow

    url = host or (profile.kfp.host if profile else None)
    if not url:
        raise UserError("--host: no server is named; give --host URL, KFP_HOST or the profile's kfp.host")
    return Kubeflow(url, profile.kfp.namespace if profile else None, (os.environ.get(TOKEN) or "").strip() or None)


def _follow(server: Kubeflow, run: Run) -> Run:
    try:
        return server.wait(run, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo(f"no longer watched; the run goes on: {run.link}", err=True)
        sys.exit(130)


def _judge(run: Run) -> None:
    from ling_flow.flow.kubeflow import RunCanceled, RunFailed

    if run.state == "CANCELED":
        raise RunCanceled(f"run {run.name} was canceled; {run.link}")
    if run.state == "FAILED":
        raise RunFailed(f"run {run.name} failed{f': {run.error}' if run.error else ''}; {run.link}")
