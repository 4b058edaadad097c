"""Misbehaviour on demand: rules that make chosen calls fail, hang or slow down."""

from __future__ import annotations

import random
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from typing import Any

from tallystick.dev.fake_stripe.errors import StripeError, invalid

KINDS = {
    "error_500": "answers 500 and does nothing",
    "error_500_after": "does the work, then answers 500",
    "timeout_after": "does the work, holds the connection for `seconds`, then drops it",
    "drop_before": "drops the connection and does nothing",
    "rate_limit": "answers 429 and does nothing",
    "slow": "waits `seconds`, then works as usual",
}

# A retry under the same Idempotency-Key is answered from the saved answer; only what lies below that still strikes.
STRIKES_REPLAYS = frozenset({"timeout_after", "drop_before", "slow"})


@dataclass
class Rule:
    """Calls by `method` (or `*`) to a path that matches the glob `path` are struck, `times` times or without end."""

    kind: str
    method: str = "*"
    path: str = "*"
    times: int | None = None
    probability: Decimal = Decimal(1)
    seconds: Decimal = Decimal(30)
    cached: bool = False
    """Whether a 429 is saved and replayed under its Idempotency-Key, as some of Stripe's are."""
    struck: int = 0

    def show(self) -> dict[str, Any]:
        """The rule as JSON, with how often it struck."""
        return {**vars(self), "probability": str(self.probability), "seconds": str(self.seconds)}


class Faults:
    """The rules, in the order in which they were added; the first that strikes decides."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []

    def add(self, body: dict[str, Any]) -> Rule:
        """Makes a rule from JSON. Raises StripeError 400 when it is malformed."""
        unknown = body.keys() - {"kind", "method", "path", "times", "probability", "seconds", "cached"}
        if unknown:
            raise invalid(f"A rule has no {', '.join(sorted(unknown))}.", param=min(unknown))
        if body.get("kind") not in KINDS:
            raise invalid(f"kind is one of {', '.join(KINDS)}.", param="kind")
        times = body.get("times")
        if times is not None and (type(times) is not int or times < 1):
            raise invalid("times is a whole number from 1, or null for no end.", param="times")
        rule = Rule(
            kind=body["kind"],
            method=str(body.get("method", "*")).upper(),
            path=str(body.get("path", "*")),
            times=times,
            probability=_number(body, "probability", Decimal(1)),
            seconds=_number(body, "seconds", Decimal(30)),
            cached=body.get("cached") is True,
        )
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Takes all rules away."""
        self.rules.clear()

    def draw(self, method: str, path: str, replay: bool, chance: random.Random) -> Rule | None:
        """The rule that strikes this call, if any; counts it."""
        for rule in self.rules:
            if rule.times is not None and rule.struck >= rule.times:
                continue
            if rule.method not in ("*", method) or not fnmatchcase(path, rule.path):
                continue
            if replay and rule.kind not in STRIKES_REPLAYS:
                continue
            if rule.probability < 1 and chance.random() >= rule.probability:
                continue
            rule.struck += 1
            return rule
        return None


def _number(body: dict[str, Any], name: str, default: Decimal) -> Decimal:
    try:
        number = Decimal(str(body.get(name, default)))
    except InvalidOperation:
        raise invalid(f"{name} is a number.", param=name) from None
    if not number.is_finite() or number < 0:
        raise invalid(f"{name} is a number, not below 0.", param=name)
    return number


def server_error() -> StripeError:
    """The 500 of a fault."""
    return StripeError(500, "An injected error: the fake Stripe was told to fail here.", type="api_error")


def rate_limited() -> StripeError:
    """The 429 of a fault or of a rate limit."""
    return StripeError(429, "Too many requests: slow down and try again.", code="rate_limit")
