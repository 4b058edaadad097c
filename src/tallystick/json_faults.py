"""What is wrong with a JSON text that could not be read, and in which field of it, which no parser says.

Only texts that were refused are looked at here, and only as far as it costs little.
"""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import NoReturn

# As many as a usual body of a thousand events has; a tenth of a second.
MAX_TOKENS = 50_000
# What is meant to be read here is nested four deep.
MAX_DEPTH = 100
MAX_SHOWN = 5
MAX_NAME = 100
# Python reads no more digits into an integer, since it takes ever longer.
MAX_INT_DIGITS = 4_300

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{},:]|[^\s"\[\]{},:]+', re.DOTALL)
_NUMBER = re.compile(r"-?[0-9][0-9.eE+-]*")

# Whether what is wrong stands at a token that begins at this depth.
_IsThere = Callable[[re.Match[str], int], bool]


class NoSuchNumber(ValueError):
    """A constant that Python's parser knows and JSON does not."""


def refuse_constant(name: str) -> NoReturn:
    """For `parse_constant`: RFC 8259 has no NaN and no Infinity."""
    raise NoSuchNumber(f"it has no number {name}")


def explain(raw: bytes, error: Exception) -> tuple[str, str | None]:
    """Why a parser raised `error` on this text, to follow "not valid JSON:", and the field in which it happened.

    The field is written as `customers.3` or `1.value`. None where it is in none, or too far on to be looked for.
    """
    text = raw.decode("utf-8-sig", "replace")
    match error:
        case UnicodeDecodeError():
            before = len(raw[: error.start].decode("utf-8-sig", "replace"))
            return f"byte {error.start + 1} is not UTF-8", _find_field(text, _reaches(before))
        case json.JSONDecodeError():
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            return f"{line}column {error.colno} cannot be read", _find_field(text, _reaches(error.pos))
        case RecursionError():
            return "it is nested too deeply", _find_field(text, lambda _, depth: depth > MAX_DEPTH)
        case NoSuchNumber():
            return str(error), _find_field(text, lambda token, _: token[0].lstrip("-") in ("NaN", "Infinity"))
        case _:
            return "it has a number beyond all bounds", _find_field(text, lambda token, _: _is_beyond_bounds(token[0]))


def _reaches(position: int) -> _IsThere:
    return lambda token, _: token.end() > position


def _is_beyond_bounds(token: str) -> bool:
    if _NUMBER.fullmatch(token) is None:
        return False
    try:
        return len(token) > MAX_INT_DIGITS or Decimal(token).is_infinite()
    except ArithmeticError:
        return True


def _find_field(text: str, is_there: _IsThere) -> str | None:
    path: list[str | int | None] = []  # of each value that is open, which member is being read; None before its name
    for number, token in enumerate(_TOKEN.finditer(text)):
        if number == MAX_TOKENS:
            return None
        if is_there(token, len(path)):
            break
        first = token[0][0]
        if first in "[{":
            path.append(0 if first == "[" else None)
        elif not path:
            continue
        elif first in "]}":
            path.pop()
        elif first == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
        elif first == '"' and path[-1] is None:
            path[-1] = token[0].strip('"')[:MAX_NAME]
    return ".".join(str(member) for member in path[:MAX_SHOWN] if member is not None) or None
