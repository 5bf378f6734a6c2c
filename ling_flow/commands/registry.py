"""`lingflow promote`, `rollback` and `promotions`: what becomes of registered versions, and the record of it."""

from __future__ import annotations

import json

import click

from ling_flow.errors import UserError


@click.command()
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@click.option("--force", metavar="REASON", help="Promote whatever the gates say; the reason is recorded.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def promote(name: str, version: int, force: str | None, as_json: bool) -> None:
    """Make VERSION of model NAME the champion, if it passes its gates against the champion of today.

    Gates and evaluation are those that its registration recorded. The next `lingflow run` deploys the new champion.
    """
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry

    if force is not None and not force.strip():
        raise UserError("--force: give the reason, which is recorded")
    registry = Registry.of(Context.from_environment())
    found = registry.version(name, version)
    if found is None:
        raise UserError(f"{name}: no version {version} in {registry.tracking_uri}")
    if not found.gates and force is None:
        raise UserError(f"{name}: version {version} has no recorded gates; give --force REASON to promote it unjudged")
    decision = registry.promote(found, found.gates, force, by_hand=True)
    if not decision.promoted:
        raise UserError(f"{name}: version {version} is not promoted: {'; '.join(decision.sentences)}")
    before = decision.champion_before.number if decision.champion_before else None
    if as_json:
        told = {"model": name, "champion": version, "champion_before": before, "reasons": decision.sentences}
        click.echo(json.dumps(told))
        return
    for sentence in decision.sentences:
        click.echo(sentence)
    if before == version:
        click.echo(f"{name}: version {version} is the champion already")
    else:
        click.echo(f"{name}: version {version} is champion now, {f'version {before}' if before else 'none'} was before")


@click.command()
@click.argument("name")
@click.option("--reason", metavar="TEXT", default="no reason given", help="Why; recorded.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def rollback(name: str, reason: str, as_json: bool) -> None:
    """Make the previous champion of model NAME champion again. The version rolled back stays back until --force."""
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry

    champion = Registry.of(Context.from_environment()).rollback(name, reason)
    if as_json:
        click.echo(json.dumps({"model": name, "champion": champion.number, "reason": reason}))
    else:
        click.echo(f"{name}: version {champion.number} is champion again")


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def promotions(name: str, as_json: bool) -> None:
    """List every decision about model NAME, oldest first."""
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry

    registry = Registry.of(Context.from_environment())
    records = registry.promotions(name)
    if as_json:
        click.echo(json.dumps({"model": name, "promotions": [record.model_dump(mode="json") for record in records]}))
        return
    if not records:
        raise UserError(f"{name}: nothing has been decided about it in {registry.tracking_uri}")
    for record in records:
        entry = record.entry
        what = "overtaken" if record.void else entry.action
        was = f" (champion was {entry.champion_before})" if entry.champion_before else ""
        by = f"{entry.time} by {entry.decided_by}"
        click.echo(f"{record.number:3d}  {by}  {what} version {entry.version}{was}: {'; '.join(entry.reasons)}")
