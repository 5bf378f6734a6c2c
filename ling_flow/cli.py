"""`lingflow`: run, plan and compile DAGs; serve, trace and stop models; examine the machine.

Nothing heavy is imported before a command needs it: `lingflow --help` imports none of torch, ray, mlflow, kfp.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ling_flow import __version__
from ling_flow.commands.choice import choose, dag_options, make_nodes
from ling_flow.commands.kubeflow import compile_dag, runs, submit
from ling_flow.commands.ray import job
from ling_flow.commands.registry import promote, promotions, rollback
from ling_flow.commands.stack import stack
from ling_flow.errors import LingFlowError, SystemFault, UserError

if TYPE_CHECKING:
    from rich.console import Console


CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, prog_name="lingflow")
@click.option(
    "--home", envvar="LING_FLOW_HOME", default=".lingflow", show_default=True, type=click.Path(file_okay=False),
    help="Where artifacts, the tracking database and run logs live.",
)  # fmt: skip
def cli(home: str) -> None:
    """From nothing to a served sparse Mixture-of-Experts language model, as one pipeline."""
    os.environ["LING_FLOW_HOME"] = str(Path(home).absolute())


@cli.command()
@dag_options
@click.option("--no-cache", is_flag=True, help="Redo every step although its artifact is there.")
@click.option(
    "--rebuild", multiple=True, metavar="STEP", help="Redo one step although its artifact is there; repeatable."
)
@click.option(
    "--runner",
    type=click.Choice(["subprocess", "docker"]),
    default="subprocess",
    show_default=True,
    envvar="LING_FLOW_RUNNER",
    help="docker: each step in a container of its image (LING_FLOW_IMAGE), by the engine at DOCKER_HOST.",
)
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="With docker: a file or directory outside the home that steps may read; repeatable.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Last line of standard output: one JSON object with every figure."
)  # fmt: skip
def run(
    dag: str,
    preset: str | None,
    seed: int | None,
    assignments: Sequence[str],
    config_file: str | None,
    no_cache: bool,
    rebuild: Sequence[str],
    runner: Literal["subprocess", "docker"],
    mounts: Sequence[Path],
    as_json: bool,
) -> None:
    """Run DAG on this machine (default: lifecycle). Finished steps are served from their artifacts."""
    from ling_flow.flow.context import Context
    from ling_flow.flow.live import summary_table
    from ling_flow.flow.runner import run_local

    os.environ["LING_FLOW_RUNNER"] = runner
    if runner == "docker":
        from ling_flow.flow.containers import Engine, select_image

        select_image(Engine.connect())
    elif mounts:
        raise UserError("--mount: has a meaning with --runner docker only; steps in processes see every file")
    loaded, arguments = choose(dag, preset, seed, assignments, config_file)
    nodes = make_nodes(loaded, arguments, frozenset(rebuild), will_run=True)
    context, console = Context.from_environment(), _console(stderr=True)
    finished = run_local(
        loaded, arguments, nodes, context, console, frozenset(rebuild), no_cache, runner=runner, mounts=mounts
    )
    console.print()
    console.print(summary_table(finished.steps))
    console.print(
        f"\n{loaded.name} finished in {finished.seconds:.0f} s. Details: {finished.directory}", highlight=False
    )
    if as_json:
        click.echo(json.dumps(finished.to_json()))


def _family_options(command: Any) -> Any:
    """The options of `plan` that a model preset takes. Values are checked with the model, in one line."""
    options = (
        click.option("--context", help="Tokens per sequence. [default: 4096]"),
        click.option("--scores", help="Attention scores counted: full (as the laws do) or causal. [default: full]"),
        click.option("--tokens", help="Training tokens. [default: 20e12]"),
        click.option("--mfu", help="Share of the GPUs' peak that training reaches. [default: 0.35]"),
        click.option("--gpu", help="a100, h20, h100, h800 or h200: gives peak (dense bf16) and power. [default: h800]"),
        click.option("--peak-tflops", help="Another peak of one GPU, TFLOP/s."),
        click.option("--watts", help="Another power of one GPU, W."),
        click.option(
            "--layout", multiple=True, metavar="FIELD=VALUE",
            help="Change data, expert, pipeline, sharding, precision, optimizer, micro_batch or recompute; repeatable.",
        ),
    )  # fmt: skip
    for option in reversed(options):  # the last one applied is listed first
        command = option(command)
    return command


@cli.command()
@dag_options
@_family_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure.")
def plan(
    dag: str,
    preset: str | None,
    seed: int | None,
    assignments: Sequence[str],
    config_file: str | None,
    as_json: bool,
    layout: Sequence[str],
    **cost: str | None,
) -> None:
    """Say what `run` would do, node by node: cached, or why not. Nothing is run.

    With --preset mini, flash or one_t, the Ling 2.0 family: parameters, FLOPs, memory and cost of training, beside the
    published figures. --context to --layout belong to it.
    """
    from ling_flow.model.family import FAMILY

    given = {name: value for name, value in cost.items() if value is not None}
    if preset in FAMILY and dag == "lifecycle":
        unused = {"--seed": seed is not None, "--set": assignments, "--config": config_file}
        for name in (name for name, used in unused.items() if used):
            raise UserError(f"{name}: has no meaning with --preset {preset}, which is a model and not a pipeline")
        _plan_family(preset, given, layout, as_json)
        return
    for name in (*given, *(["layout"] if layout else [])):
        raise UserError(f"--{name.replace('_', '-')}: needs one of --preset {', '.join(FAMILY)}")
    loaded, arguments = choose(dag, preset, seed, assignments, config_file)
    nodes = make_nodes(loaded, arguments, frozenset())
    if as_json:
        rows = [
            {
                "step": n.label,
                "component": n.component.name,
                "fingerprint": n.fingerprint,
                "state": n.state,
                "reason": n.reason,
            }
            for n in nodes
        ]
        click.echo(json.dumps({"dag": loaded.name, "nodes": rows}))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "fingerprint", "", "why"):
        table.add_column(column, overflow="fold")
    for node in nodes:
        table.add_row(node.label, node.fingerprint, node.state, node.reason)
    _console().print(table)


def _plan_family(preset: str, options: dict[str, str], layout: Sequence[str], as_json: bool) -> None:
    from ling_flow.family_plan import family_figures, family_table

    figures = family_figures(preset, options, layout)
    if as_json:
        click.echo(json.dumps(figures[preset]))
    else:
        _console().print(family_table(figures, preset))


@cli.command()
@click.argument("model_uri")
@click.option("--port", type=click.IntRange(1, 65535), help="HTTP port. [default: the first free one from 8000]")
def serve(model_uri: str, port: int | None) -> None:
    """Serve MODEL_URI in the foreground with the OpenAI HTTP API, until Ctrl-C.

    MODEL_URI: models:/NAME@champion, models:/NAME/3, models:/m-…, or a model directory.
    """
    from ling_flow.flow.context import Context
    from ling_flow.flow.lineage import resolve_model
    from ling_flow.serving.server import serve_foreground

    model = resolve_model(model_uri, Context.from_environment())
    serve_foreground(model.path, model.name, port, model.fingerprint)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def stop(as_json: bool) -> None:
    """Stop the endpoints that deploy steps left running here."""
    from ling_flow.flow.context import Context
    from ling_flow.serving.server import stop_all

    stopped = stop_all(Context.from_environment().home)
    click.echo(
        json.dumps({"stopped": stopped}) if as_json else f"stopped: {', '.join(stopped) or 'nothing was running'}"
    )


@cli.command()
@click.argument("model_uri")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a tree.")
def lineage(model_uri: str, as_json: bool) -> None:
    """Trace MODEL_URI back: checkpoints, data, code version."""
    from ling_flow.flow.context import Context
    from ling_flow.flow.lineage import lineage_tree, render_tree, resolve_model

    context = Context.from_environment()
    tree = lineage_tree(resolve_model(model_uri, context))
    if as_json:
        click.echo(tree.model_dump_json())
        return
    _console().print(render_tree(tree))


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--fp8", is_flag=True, help="Projections in blockwise FP8. [default: all in the type of config.json]")
def convert(source: Path, destination: Path, fp8: bool) -> None:
    """Write the checkpoint SOURCE (a Hugging Face directory) in another form to DESTINATION, tensor by tensor."""
    from ling_flow.model.hf import convert_checkpoint

    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: is not an empty directory; give a new one")
    try:
        convert_checkpoint(source, destination, fp8)
    except OSError as error:  # a full disk, no permission; nothing half-written stays
        raise SystemFault(f"{destination}: {error.strerror or error}") from None
    click.echo(f"wrote {destination}", err=True)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(as_json: bool) -> None:
    """Examine this machine: can it run the lifecycle?"""
    from ling_flow.flow.context import Context
    from ling_flow.flow.doctor import as_dicts, examine
    from ling_flow.flow.tracking import default_tracking_uri

    context = Context.from_environment()
    checks = examine(context.home, context.tracking_uri or default_tracking_uri(context.home))
    if as_json:
        click.echo(json.dumps({"checks": as_dicts(checks)}))
    else:
        marks = {"ok": "✓", "warning": "!", "failed": "✗"}
        for check in checks:
            advice = f"  → {check.advice}" if check.advice else ""
            click.echo(f"{marks[check.status]} {check.name:12} {check.found}{advice}")
    if any(check.status == "failed" for check in checks):
        sys.exit(3)


def _console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; in files and pipes nothing is folded or cut."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 400)


cli.add_command(job)
cli.add_command(compile_dag)
cli.add_command(submit)
cli.add_command(runs)
cli.add_command(promote)
cli.add_command(rollback)
cli.add_command(promotions)
cli.add_command(stack)


def main() -> None:
    """Entry point: errors in one line, exit codes 2 (yours), 3 (the system's), 1 (ours, with a traceback)."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(UserError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run again to go on from here", err=True)
        sys.exit(130)
    except LingFlowError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
