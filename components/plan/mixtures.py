"""Mixtures name the sources of the corpus; a corpus of one's own has other names than the preset's."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ling_flow.errors import UserError

if TYPE_CHECKING:
    from components.plan import LifecycleConfig

FIELDS = ("mixture", "mixture_end")


def without_absent_sources(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The preset `base` as JSON data; where `overrides` brings sources of its own, its mixtures no longer name others.

    A mixture that nothing stays of is left empty, for `overrides` to fill.
    """
    data = overrides.get("prepare_data")
    given = data.get("sources") if isinstance(data, Mapping) else None
    if not isinstance(given, list):
        return dict(base)
    names = {source.get("name") for source in given if isinstance(source, Mapping)}
    changed: dict[str, Any] = {}
    for phase, config in base.items():
        kept = {
            field: {source: weight for source, weight in config[field].items() if source in names}
            for field in FIELDS
            if config.get(field) is not None
        }
        changed[phase] = {**config, **kept}
    return changed


def check_filled(config: Mapping[str, Any]) -> None:
    """Of the configs by phase, as JSON data that is not validated yet.

    Raises:
        UserError: a mixture that the preset's names have left empty.
    """
    empty = [
        f"{phase}.{field}" for phase, fields in config.items() if isinstance(fields, Mapping)
        for field in FIELDS if fields.get(field) == {}
    ]  # fmt: skip
    if empty:
        raise UserError(
            f"{', '.join(empty)}: missing; the preset's sources are replaced, so give the weight of each of yours"
        )


def check_mixtures(config: LifecycleConfig) -> None:
    """Before anything is spent: mixtures and sources fit each other.

    Raises:
        UserError: a mixture names what is no source, or a source is in no mixture.
    """
    sources = [source.name for source in config.prepare_data.sources]
    named: set[str] = set()
    for field, mixture in _mixtures(config):
        named |= mixture.keys()
        for name in mixture:
            if name not in sources:
                near = difflib.get_close_matches(name, sources, n=1)
                advice = f"did you mean '{near[0]}'?" if near else f"they are {', '.join(sources)}"
                raise UserError(f"{field}.{name}: is none of prepare_data.sources; {advice}")
    for name in sources:
        if name not in named:
            fields = ", ".join(field for field, _ in _mixtures(config))
            raise UserError(f"prepare_data.sources: {name!r} is in no mixture; give it a weight (or 0) in {fields}")


def _mixtures(config: LifecycleConfig) -> Iterator[tuple[str, dict[str, float]]]:
    for phase in type(config).model_fields:
        for field in FIELDS:
            mixture = getattr(getattr(config, phase), field, None)
            if mixture is not None:
                yield f"{phase}.{field}", mixture
