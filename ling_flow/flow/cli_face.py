"""A component's command line: `python -m components.pretrain --config f.yaml --optimizer.eps 1e-9 --corpus REF`.

Every config field is an option under its dotted path; flags win over the file. Exit codes: `ling_flow.errors`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from ling_flow.config import merge, parse_overrides, read_yaml
from ling_flow.errors import UserError
from ling_flow.flow.component import Component
from ling_flow.flow.events import report_failure
from ling_flow.flow.fields import Leaf, leaves
from ling_flow.flow.step import Outcome, exit_on_sigterm, run_step


def main(component: Component, argv: Sequence[str] | None) -> NoReturn:
    """Run the component as the arguments say and leave the process: 0, or 1 (defect), 2 (user) or 3 (system)."""
    exit_on_sigterm()
    label = component.name
    try:
        values = command(component).main(
            args=None if argv is None else list(argv),
            prog_name=f"python -m {component.body.__module__}",
            standalone_mode=False,
        )
        if not isinstance(values, dict):
            sys.exit(values)  # --help has been printed
        config = component.parse_config(config_of(component, values))
        label = component.label_of(config)
        given = {name: values[_slot("input", name)] for name in component.inputs}
        outcome = run_step(component, config, given, root=values["root"], rebuild=values["rebuild"])
        if os.environ.get("LING_FLOW_EVENTS") != "-":  # who reads those has the outcome
            print(as_json(outcome) if values["json"] else as_table(outcome), flush=True)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.ClickException as error:
        sys.exit(report_failure(label, UserError(_one_line(error))))
    except Exception as error:
        sys.exit(report_failure(label, error))
    sys.exit(0)


def command(component: Component) -> click.Command:
    """The click command; calling it returns the option values by slot (see `_slot`)."""
    file = "YAML file with config fields; flags win over it."
    default_root = "LING_FLOW_ARTIFACTS, else artifacts in LING_FLOW_HOME (.lingflow)"
    options: list[click.Parameter] = [
        click.Option(["--config"], type=click.Path(path_type=Path), metavar="FILE", help=file),
        click.Option(["--config-json"], metavar="JSON", help="The config as one JSON text, instead of a file."),
    ]  # fmt: skip
    for name, spec in component.inputs.items():
        text = f"{spec.kind.__name__} artifact: ROOT/COMPONENT/FINGERPRINT/OUTPUT of an earlier step."
        need = "[optional]" if spec.optional else "[required]"
        options.append(click.Option([_slot("input", name), f"--{name}"], metavar="REF", help=f"{text}  {need}"))
    for leaf in leaves(component.config_model):
        options.append(
            click.Option([_slot("field", leaf.path), f"--{leaf.path}"], metavar=_metavar(leaf), help=_help(leaf))
        )
    options += [
        click.Option(["--root"], metavar="ROOT", help=f"Artifact root, path or URL.  [default: {default_root}]"),
        click.Option(["--rebuild"], is_flag=True, help="Redo the step although its artifact exists."),
        click.Option(["--json"], is_flag=True, help="Print the outcome as one JSON object on the last line."),
    ]  # fmt: skip
    return click.Command(name=component.name, params=options, callback=lambda **values: values, help=component.docs)


def config_of(component: Component, values: dict[str, Any]) -> dict[str, Any]:
    """Config fields from the file, with the flags over them."""
    if values["config"] and values["config_json"]:
        raise UserError("--config and --config-json: give one of them")
    tree = read_yaml(values["config"]) if values["config"] else _read_json(values["config_json"])
    for leaf in leaves(component.config_model):
        text = values[_slot("field", leaf.path)]
        if text is not None:
            tree = merge(tree, _assign(leaf, text))
    return tree


def _read_json(text: str | None) -> dict[str, Any]:
    try:
        tree = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--config-json: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError("--config-json: must be an object of config fields")
    return tree


def as_json(outcome: Outcome) -> str:
    """The outcome as one JSON object on one line."""
    return json.dumps(
        {
            "component": outcome.component.name,
            "label": outcome.label,
            "fingerprint": outcome.fingerprint,
            "cached": outcome.cached,
            "seconds": outcome.seconds,
            "result": outcome.manifest.result,
            "outputs": outcome.refs,
        }
    )


def as_table(outcome: Outcome) -> str:
    """Result fields and outputs, one a line."""
    rows = {name: _number(value) for name, value in outcome.manifest.result.items()} | outcome.refs
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _slot(group: str, name: str) -> str:
    """The identifier under which click keeps an option's value."""
    return f"{group}__{name.replace('.', '__')}"


def _assign(leaf: Leaf, text: str) -> dict[str, Any]:
    """The nested mapping that sets `leaf` to what was typed."""
    if not leaf.is_text or (text == "null" and "null" in leaf.type.split("|")):
        return parse_overrides([f"{leaf.path}={text}"])
    tree: Any = text
    for key in reversed(leaf.path.split(".")):
        tree = {key: tree}
    return tree


def _metavar(leaf: Leaf) -> str:
    return leaf.type if "[" not in leaf.type and len(leaf.type) < 30 else "YAML"


def _help(leaf: Leaf) -> str:
    facts = [leaf.constraints] if leaf.constraints else []
    if _metavar(leaf) == "YAML":
        facts.insert(0, leaf.type)
    facts.append("required" if leaf.required else f"default: {json.dumps(leaf.default, ensure_ascii=False)}")
    why = f" (not part of the fingerprint: {leaf.not_identity})" if leaf.not_identity else ""
    return f"{leaf.description}{why}  [{'; '.join(facts)}]"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _one_line(error: click.ClickException) -> str:
    if isinstance(error, click.NoSuchOption):
        advice = f"did you mean {error.possibilities[0]}?" if error.possibilities else "see --help"
        return f"unknown option {error.option_name}; {advice}"
    text = " ".join(error.format_message().split())
    return text[0].lower() + text[1:]
