"""The fields of a config model as flat, dotted leaves: what `--help` and the KFP description are made of."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, RootModel, Secret, SecretBytes, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from ling_flow.config import NOT_IDENTITY, canonical_json, models_in, types_in

_CONSTRAINTS = {
    "gt": "> {}",
    "ge": ">= {}",
    "lt": "< {}",
    "le": "<= {}",
    "multiple_of": "a multiple of {}",
    "min_length": "length >= {}",
    "max_length": "length <= {}",
    "pattern": "matches {}",
}


@dataclass(frozen=True)
class Leaf:
    """One settable value of a config, at `path` ("optimizer.learning_rate"); `default` is plain JSON data."""

    path: str
    annotation: Any
    type: str
    required: bool
    default: Any
    description: str
    constraints: str
    not_identity: str | None

    @property
    def is_text(self) -> bool:
        """Whether the value is text as typed, so that `007` must not become a number."""
        return all(member in (str, Path) for member in _members(self.annotation))


def leaves(model: type[BaseModel], prefix: str = "", default: BaseModel | None = None) -> Iterator[Leaf]:
    """Every leaf below `model`, in declaration order; values of `default` stand in for the model's own defaults."""
    for name, field in model.model_fields.items():
        required = default is None and field.is_required()
        value = getattr(default, name) if default is not None else _default(field)
        if _is_model(field.annotation):
            yield from leaves(field.annotation, f"{prefix}{name}.", value)  # type: ignore[arg-type]
            continue
        extra = field.json_schema_extra
        yield Leaf(
            path=prefix + name,
            annotation=field.annotation,
            type=type_text(field.annotation),
            required=required,
            default=None if required else _jsonable(value),
            description=field.description or "",
            constraints=", ".join(_constraints(field)),
            not_identity=str(extra[NOT_IDENTITY]) if isinstance(extra, Mapping) and NOT_IDENTITY in extra else None,
        )


def check_fields(model: type[BaseModel], where: str) -> None:
    """What Pydantic allows and a component cannot keep: everything must be written down and read back as it was.

    Raises:
        TypeError: a field, at whatever depth, cannot; the message names it and says what would be right.
    """
    for current in sorted(models_in(model), key=lambda kind: kind.__qualname__):
        for name, field in current.model_fields.items():
            problem = _problem(field)
            if problem:
                raise TypeError(f"{where}: field {name} of {current.__name__} {problem}")
        for name in current.model_computed_fields:
            advice = "is computed and cannot be read back; make it a plain property"
            raise TypeError(f"{where}: field {name} of {current.__name__} {advice}")


def _problem(field: FieldInfo) -> str:
    kinds = {typing.get_origin(kind) or kind for kind in types_in(field.annotation)}
    if kinds & {SecretStr, SecretBytes, Secret}:
        return "is a secret, which configs and results do not hold; read it from an environment variable"
    if kinds & {bytes, bytearray}:
        return "is of bytes, which JSON does not hold; make it a str"
    if field.alias or field.validation_alias or field.serialization_alias:
        return "has an alias; give the field the one name that it is to have everywhere"
    if field.exclude:
        return "is excluded from what is written down; what cannot change the numbers is a `context_field`"
    if field.default_factory_takes_validated_data:
        return "takes its default from other fields; make the default None and set it in a `model_validator`"
    return ""


def _jsonable(value: Any) -> Any:
    """A default as plain JSON data; a set's order differs from process to process, so it is sorted."""
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable_python(item) for item in value), key=canonical_json)
    return to_jsonable_python(value)


def with_defaults(
    model: type[BaseModel], changes: Mapping[str, Any], default: BaseModel | None = None
) -> dict[str, Any]:
    """`changes` laid over the defaults of nested models.

    Pydantic alone would build a partly given nested model from its own defaults and forget those of the field that
    holds it.
    """
    tree: dict[str, Any] = {} if default is None else dict(default)
    for name, value in changes.items():
        field = model.model_fields.get(name)
        if field is not None and _is_model(field.annotation) and isinstance(value, Mapping):
            inner = getattr(default, name) if default is not None else _default(field)
            value = with_defaults(field.annotation, value, inner)  # type: ignore[arg-type]
        tree[name] = value
    return tree


def type_text(annotation: Any) -> str:
    """A type as people write it: `int`, `a|b` for literals, `float|null`, `list[int]`."""
    if annotation is type(None):
        return "null"
    origin = _origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in arguments)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(type_text(argument) for argument in arguments)
    if origin is not None:
        inner = ", ".join("..." if argument is Ellipsis else type_text(argument) for argument in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _members(annotation: Any) -> list[Any]:
    """The types a value may have: union members and literal values' types, without None."""
    origin = _origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [inner for part in typing.get_args(annotation) for inner in _members(part)]
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin is Literal:
        return [type(value) for value in typing.get_args(annotation)]
    return [] if annotation is type(None) else [annotation]


def _origin(annotation: Any) -> Any:
    return typing.Annotated if hasattr(annotation, "__metadata__") else typing.get_origin(annotation)


def _constraints(field: FieldInfo) -> Iterator[str]:
    for item in field.metadata:
        for name, text in _CONSTRAINTS.items():
            value = getattr(item, name, None)
            if value is not None:
                yield text.format(value)


def _is_model(thing: Any) -> bool:
    """Whether it has fields of its own; a RootModel is its one value."""
    return isinstance(thing, type) and issubclass(thing, BaseModel) and not issubclass(thing, RootModel)
