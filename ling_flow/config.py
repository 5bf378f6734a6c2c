"""Typed configuration: strict Pydantic models, one-line errors, dotted overrides, and which fields bear identity.

Every config in the project derives from `StrictModel`. A field that cannot change the numbers a step produces (a path,
a port, a device) is declared with `context_field` and a stated reason; all others take part in the step's fingerprint.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError

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
    """The identity-bearing part of `config` as plain JSON data: all fields but those declared by `context_field`.

    Raises:
        UserError: a value cannot be written down whole; the line names its path.
        ValueError: a number is infinite or NaN.
    """
    return _written(config, whole=False)


def plain(config: BaseModel) -> dict[str, Any]:
    """All of `config` as plain JSON data, the same in every process: sets are sorted. Raises as `identity_of`."""
    return _written(config, whole=True)


def _written(config: BaseModel, whole: bool) -> dict[str, Any]:
    try:
        dumped = config.model_dump(mode="json")
    except PydanticSerializationError as error:
        raise UserError(f"cannot be written as JSON ({error})") from None
    declared = models_in(type(config))

    def walk(value: Any, dumped: Any, path: str) -> Any:
        if isinstance(value, RootModel):
            return walk(value.root, dumped, path)
        if isinstance(value, BaseModel) and isinstance(dumped, dict):
            if type(value) not in declared:  # Pydantic takes it, and writes down the fields of its base only
                raise UserError(f"{path}: is a {type(value).__name__}, which the field's type does not name")
            names = [name for name, field in type(value).model_fields.items() if whole or not _is_context(field)]
            return {name: walk(getattr(value, name), dumped[name], _below(path, name)) for name in names}
        if isinstance(value, Set) and isinstance(dumped, list):
            items = [walk(item, written, f"{path}{{}}") for item, written in zip(value, dumped, strict=True)]
            return sorted(items, key=canonical_json)  # their order differs from process to process
        if isinstance(value, Sequence) and isinstance(dumped, list):
            pairs = zip(value, dumped, strict=True)
            return [walk(item, written, _below(path, index)) for index, (item, written) in enumerate(pairs)]
        if isinstance(value, Mapping) and isinstance(dumped, dict):
            if len(value) != len(dumped):
                raise UserError(f"{path}: has keys that are different but written alike")
            pairs = zip(value.values(), dumped.items(), strict=True)
            return {key: walk(item, written, _below(path, key)) for item, (key, written) in pairs}
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} is {value}")
        return dumped

    written: dict[str, Any] = walk(config, dumped, "")
    return written


def _below(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _is_context(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, Mapping) and NOT_IDENTITY in field.json_schema_extra


def types_in(annotation: Any) -> Iterator[Any]:
    """Every type that an annotation names, within unions, containers and aliases too."""
    annotation = getattr(annotation, "__value__", annotation)
    yield annotation
    for argument in typing.get_args(annotation):
        yield from types_in(argument)


@functools.cache
def models_in(model: type[BaseModel]) -> frozenset[type[BaseModel]]:
    """`model` and all models that its fields name, at any depth."""
    found: set[type[BaseModel]] = set()
    waiting = [model]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            for field in current.model_fields.values():
                waiting += [kind for kind in types_in(field.annotation) if _is_model(kind)]
    return frozenset(found)


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
        UserError: an assignment without `=`, with an empty name, of a number that is not finite, or of a mapping with a
            key given twice.
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
        except UserError as error:
            raise UserError(f"--set {assignment}: {str(error).removeprefix('line 1: ')}") from None
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
    """As JSON could hold it: what looks like a date is a text, a key is the text that was written.

    Raises:
        UserError: a key is given twice, or is no plain word.
        yaml.YAMLError: it is not YAML, or has a tag for what JSON cannot hold.
    """
    import yaml

    checked: set[int] = set()  # nodes; one that `<<` names is seen again, with what was laid below it

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
        yaml_constructors = {  # noqa: RUF012
            tag: construct
            for tag, construct in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.rsplit(":", 1)[-1] in ("null", "bool", "int", "float", "str", "seq", "map")
        }

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            """What holds itself is found out only while it is made in depth."""
            return super().construct_object(node, deep=True)

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """Called for a mapping before it is read; lays what `<<` names below the mapping's own keys."""
            seen = set()
            for key, _ in [] if id(node) in checked else node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise UserError(f"line {line}: a key must be a name, not a {key.id}")
                if key.tag != "tag:yaml.org,2002:merge":
                    key.tag = "tag:yaml.org,2002:str"
                if key.value in seen:
                    raise UserError(f"line {line}: '{key.value}' is given twice")
                seen.add(key.value)
            checked.add(id(node))
            super().flatten_mapping(node)

    return yaml.load(text, Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) file that holds a mapping.

    Raises:
        UserError: the file is missing, unreadable, not a mapping, or gives a key twice.
    """
    import yaml

    try:
        data = _load_yaml(path.read_text())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
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
