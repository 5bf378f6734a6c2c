"""`lingflow stack`: PostgreSQL, an S3 store and MLflow on this machine, as a team would run them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ling_flow.flow.stack import ServerStatus, Stack


@click.group()
def stack() -> None:
    """MLflow with passwords on PostgreSQL and S3, started here and kept in $LING_FLOW_HOME/stack."""


@stack.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def up(as_json: bool) -> None:
    """Start what does not run yet and wait until all three answer. Data of earlier times is there again."""
    ours = _stack()
    ours.up()
    servers = ours.status()
    _show(ours, servers, as_json)
    if not as_json:
        click.echo(f'\nuse it: eval "$(lingflow stack env)"    user and password of the page: {ours.env_file}')


@stack.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(as_json: bool) -> None:
    """Say which server runs, and which crashed. Exit code 3 where one that should run does not answer."""
    ours = _stack()
    servers = ours.status()
    _show(ours, servers, as_json)
    if any(server.state in ("crashed", "not answering") for server in servers):
        sys.exit(3)


@stack.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def down(as_json: bool) -> None:
    """Stop the servers. Their data stays."""
    stopped = _stack().down()
    click.echo(
        json.dumps({"stopped": stopped}) if as_json else f"stopped: {', '.join(stopped) or 'nothing was running'}"
    )


@stack.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines for a shell.")
def env(as_json: bool) -> None:
    """Print the variables that lead to the stack, secrets included, for `eval`."""
    ours = _stack()
    variables = ours.environment()
    click.echo(json.dumps(variables) if as_json else ours.env_file.read_text(), nl=as_json)


def _stack() -> Stack:
    from ling_flow.flow.stack import Stack

    return Stack(Path(os.environ["LING_FLOW_HOME"]) / "stack")


def _show(ours: Stack, servers: list[ServerStatus], as_json: bool) -> None:
    if as_json:
        told = {"directory": str(ours.directory), "servers": [server.model_dump() for server in servers]}
        click.echo(json.dumps(told))
        return
    for server in servers:
        where = "" if server.state == "healthy" else f"  log: {server.log}"
        click.echo(f"{server.name:9} {server.state:14} {server.url}{where}")
    if not servers:
        click.echo("no stack was started here; lingflow stack up starts one")
