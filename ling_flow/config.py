"""Typed configuration: strict Pydantic models, one-line errors, dotted overrides, and which fields bear identity.

Every config in the project derives from `StrictModel`. A field that cannot change the numbers a step produces (a path,
a port, a device) is declared with `context_field` and a stated reason; all others take part in the step's fingerprint.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ling_flow.errors import UserError

NOT_IDENTITY = "not_identity"


class StrictModel(BaseModel):
    """Base of all configs and results: unknown keys are refused, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


ModelT = TypeVar("ModelT", bound=BaseModel)


def context_field(default: Any = ..., *, why: str, description: str, **constraints: Any) -> Any:
    """A field that does not bear identity: `why` states the reason and is shown in `--help`."""
    return Field(default, description=description, json_schema_extra={NOT_IDENTITY: why}, **constraints)


def identity_of(config: BaseModel) -> dict[str, Any]:
    """The identity-bearing part of `config` as plain JSON data: all fields but those declared by `context_field`."""

    def strip(model: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, field in type(model).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, Mapping) and NOT_IDENTITY in extra:
                continue
            kept[name] = walk(getattr(model, name), dumped[name])
        return kept

    def walk(value: Any, dumped: Any) -> Any:
        if isinstance(value, BaseModel):
            return strip(value, dumped)
        if isinstance(value, list | tuple):
            return [walk(item, item_dumped) for item, item_dumped in zip(value, dumped, strict=True)]
        if isinstance(value, Mapping):
            return {key: walk(item, dumped[key]) for key, item in value.items()}
        return dumped

    return strip(config, config.model_dump(mode="json"))


def parse(model: type[ModelT], data: Mapping[str, Any] | str, where: str) -> ModelT:
    """Validate `data` (a mapping, or JSON text) as `model`.

    Raises:
        UserError: one line that names the first wrong field by its dotted path below `where`.
    """
    try:
        return model.model_validate_json(data) if isinstance(data, str) else model.model_validate(data)
    except ValidationError as error:
        raise UserError(describe(error, model, where)) from None


def describe(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line for a Pydantic error: dotted path, what is wrong, and the nearest known name for an unknown key."""
    errors = error.errors()
    first = errors[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if str(part) != "")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _known_fields(model, first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        message = "unknown field" + (f"; did you mean '{near[0]}'?" if near else f"; known fields: {', '.join(known)}")
    elif first["type"] == "missing":
        message = "required field is missing"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]} (got {first['input']!r})"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{path}: {message}{more}"


def _known_fields(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Field names of the model that `loc` (a Pydantic error location) points into."""
    current: Any = model
    for part in list(loc)[:-1]:
        annotation = (
            current.model_fields[part].annotation if _is_model(current) and part in current.model_fields else None
        )
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next((item for item in candidates if _is_model(item)), None)
    return list(current.model_fields) if _is_model(current) else []


def _is_model(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, BaseModel)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping; lists and scalars are replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "a.c=x"]` → `{"a": {"b": 1, "c": "x"}}`; values are read as YAML, so numbers, lists and null work.

    Raises:
        UserError: an assignment without `=`, with an empty name, or of a number that is not finite.
    """
    import yaml

    tree: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"--set {assignment}: expected name.path=value, for example pretrain_short.tokens=200000")
        try:
            value = _load_yaml(text)
        except yaml.YAMLError:
            value = text
        if isinstance(value, str):
            value = _number(value)
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise UserError(f"--set {assignment}: must be a finite number") from None
        leaf: Any = value
        for key in reversed(keys):
            leaf = {key: leaf}
        tree = merge(tree, leaf)
    return tree


def _number(text: str) -> Any:
    """YAML 1.1 reads `1e-3` as a string; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _load_yaml(text: str) -> Any:
    """As JSON could hold it: what looks like a date is a text."""
    import yaml

    resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": resolvers}))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) file that holds a mapping.

    Raises:
        UserError: the file is missing, unreadable, or not a mapping.
    """
    import yaml

    try:
        data = _load_yaml(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a mapping of fields, not {type(data).__name__}")
    return data


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: the same data always gives the same text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
