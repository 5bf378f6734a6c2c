"""The served model as an application that KubeRay starts (infra/kubernetes/base/ray-service.yaml)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ling_flow.errors import UserError


def champion(arguments: dict[str, str]) -> Any:
    """The Ray Serve application of a registered model.

    An alias is looked up here, once: all replicas serve the version that it stood for, also those started later.

    Args:
        arguments: `model`, a URI as `lingflow serve` takes it, for example models:/ling-tiny@champion.

    Raises:
        UserError: there is another argument than `model`, or no version has the alias.
    """
    from ling_flow.serving.ray_app import application

    if set(arguments) != {"model"}:
        raise UserError(f"args: must hold `model` and nothing else, got {', '.join(arguments) or 'nothing'}")
    uri = _pinned(arguments["model"])

    def find() -> tuple[Path, str, str]:  # on the replica's machine, to whose cache the files go
        from ling_flow.flow.context import Context
        from ling_flow.flow.lineage import resolve_model

        model = resolve_model(uri, Context.from_environment())
        return model.path, model.name, model.fingerprint

    return application(find)


def _pinned(uri: str) -> str:
    """`models:/NAME@ALIAS` as `models:/NAME/VERSION`; any other URI as it is."""
    from ling_flow.flow.context import Context
    from ling_flow.flow.promotion import Registry

    found = re.fullmatch(r"models:/([\w-]+)@([\w-]+)", uri)
    if not found:
        return uri
    version = Registry.of(Context.from_environment()).by_alias(found[1], found[2])
    if version is None:
        raise UserError(f"args: model: no version of {found[1]} has the alias {found[2]}")
    return version.uri
