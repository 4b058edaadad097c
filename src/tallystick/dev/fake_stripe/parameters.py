"""The parameters of a call, held against the SDK's own TypedDicts: what those do not have, Stripe does not take.

Form bodies arrive as text (`items[0][price]=price_1`); the TypedDicts say what is a number, a flag or a list. JSON
bodies of API v2 go through the same check.
"""

from __future__ import annotations

import functools
import importlib
import types
import typing
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Union
from urllib.parse import parse_qsl

from stripe import _request_options

from tallystick.dev.fake_stripe.errors import StripeError, invalid

# Options of the SDK's own call, mixed into many TypedDicts: they travel as headers, never as parameters.
REQUEST_OPTIONS = frozenset(_request_options.RequestOptions.__annotations__)

# Lists that the SDK types as closed but whose values the account itself defines more of (thin events' names).
OPEN_LISTS = frozenset({"enabled_events"})


@dataclass
class Shape:
    """What a parameter may be: any mix of scalars, given words, a list, a free mapping or an object with fields."""

    scalars: set[type] = field(default_factory=set)
    words: set[str] = field(default_factory=set)
    item: Shape | None = None
    mapping: bool = False
    fields: dict[str, Shape] | None = None
    required: frozenset[str] = frozenset()


def parse_form(text: str) -> dict[str, Any]:
    """`a[b][0]=c` as `{"a": {"b": {"0": "c"}}}`. Lists stay mappings until the shape tells them from objects."""
    parsed: dict[str, Any] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        head, bracket, rest = name.partition("[")
        if not bracket:
            parsed[name] = value
            continue
        steps = [head, *rest.removesuffix("]").split("][")]
        target = parsed
        for step in steps[:-1]:
            inner = target.setdefault(step, {})
            if not isinstance(inner, dict):
                raise invalid(f"Invalid parameter: {name}", param=name)
            target = inner
        last = steps[-1]
        # `expand[]=x` has no index of its own.
        target[last if last != "" else str(len(target))] = value
    return parsed


@functools.cache
def shape_of(params: str | type) -> Shape:
    """The shape of a TypedDict: a class, or the name of one below `stripe.params`, as `billing.MeterCreateParams`."""
    if isinstance(params, str):
        module, _, name = f"stripe.params.{params}".rpartition(".")
        params = getattr(importlib.import_module(module), name)
    return _fields_shape(params)


def _fields_shape(typed_dict: Any) -> Shape:
    # The request options, left out below, are annotated with names of their own module and with StripeContext, which
    # that module imports for type checkers only.
    hints = typing.get_type_hints(typed_dict, localns={**vars(_request_options), "StripeContext": str})
    fields = {name: _shape(hint) for name, hint in hints.items() if name not in REQUEST_OPTIONS}
    required = frozenset(typed_dict.__required_keys__) - REQUEST_OPTIONS
    return Shape(fields=fields, required=required)


def _shape(hint: Any) -> Shape:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return functools.reduce(_merge, map(_shape, arguments))
    if origin is Literal:
        return Shape(words={str(word) for word in arguments})
    if origin is list:
        return Shape(item=_shape(arguments[0]))
    if typing.is_typeddict(hint) or hasattr(hint, "__required_keys__"):
        return _fields_shape(hint)
    if hint in (str, int, bool, float, Decimal):
        return Shape(scalars={Decimal if hint is float else hint})
    # Dict[str, str], UntypedStripeObject[str], Dict[str, Any]: any keys.
    return Shape(mapping=True)


def _merge(one: Shape, other: Shape) -> Shape:
    return Shape(
        scalars=one.scalars | other.scalars,
        words=one.words | other.words,
        item=one.item or other.item,
        mapping=one.mapping or other.mapping,
        fields=one.fields if one.fields is not None else other.fields,
        required=one.required | other.required,
    )


def check(shape: Shape, raw: dict[str, Any]) -> dict[str, Any]:
    """The parameters with their types. Raises StripeError 400 for an unknown, missing or malformed one."""
    return _check_fields(shape, raw, "")


def _check_fields(shape: Shape, raw: dict[str, Any], path: str) -> dict[str, Any]:
    fields = shape.fields or {}
    checked: dict[str, Any] = {}
    for name, value in raw.items():
        param = f"{path}[{name}]" if path else name
        known = fields.get(name)
        if known is None:
            raise invalid(f"Received unknown parameter: {param}", param=param, code="parameter_unknown")
        checked[name] = _check_value(known, value, param)
    for name in sorted(shape.required - raw.keys()):
        param = f"{path}[{name}]" if path else name
        raise invalid(f"Missing required param: {param}.", param=param, code="parameter_missing")
    return checked


def _check_value(shape: Shape, value: Any, param: str) -> Any:
    if isinstance(value, dict):
        if shape.item is not None and all(key.isdecimal() for key in value):
            ordered = [value[key] for key in sorted(value, key=int)]
            return [_check_value(shape.item, item, f"{param}[{n}]") for n, item in enumerate(ordered)]
        if shape.fields is not None:
            return _check_fields(shape, value, param)
        if shape.mapping:
            return _check_mapping(value, param)
        raise invalid(f"Invalid {param}: no hash is expected here", param=param)
    if isinstance(value, list):
        if shape.item is None:
            raise invalid(f"Invalid array: {param}", param=param)
        return [_check_value(shape.item, item, f"{param}[{n}]") for n, item in enumerate(value)]
    return _check_scalar(shape, value, param)


def _check_mapping(value: dict[str, Any], param: str) -> dict[str, Any]:
    for key, entry in value.items():
        if not isinstance(entry, str):
            raise invalid(f"Invalid string: {param}[{key}]", param=f"{param}[{key}]")
    return value


def _check_scalar(shape: Shape, value: Any, param: str) -> Any:
    text = value if isinstance(value, str) else None
    if text in shape.words:
        return text
    if text == "" and (shape.mapping or shape.item is not None or shape.fields is not None or shape.scalars):
        return ""  # an empty value unsets
    if bool in shape.scalars and (isinstance(value, bool) or text in ("true", "false")):
        return value is True or text == "true"
    if int in shape.scalars:
        number = _as_integer(value)
        if number is not None:
            return number
    if Decimal in shape.scalars and not isinstance(value, bool):
        number_text = str(value)
        try:
            if Decimal(number_text).is_finite():
                return Decimal(number_text)
        except InvalidOperation:
            pass
    if str in shape.scalars and text is not None and (not shape.words - {""} or param.partition("[")[0] in OPEN_LISTS):
        return text
    raise _mistyped(shape, param)


def _as_integer(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and value.isascii():
        return int(value)
    return None


def _mistyped(shape: Shape, param: str) -> StripeError:
    words = sorted(shape.words - {""})
    if words:
        return invalid(f"Invalid {param}: must be one of {', '.join(words)}", param=param)
    for scalar, name in ((int, "integer"), (bool, "boolean"), (Decimal, "decimal"), (str, "string")):
        if scalar in shape.scalars:
            return invalid(f"Invalid {name}: {param}", param=param, code=f"parameter_invalid_{name}")
    kind = "array" if shape.item is not None else "object"
    return invalid(f"Invalid {kind}: {param}", param=param)
