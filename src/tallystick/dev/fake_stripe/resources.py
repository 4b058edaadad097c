"""What the calls of all resources share: routes, looking things up, lists with cursors, metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe.errors import invalid, missing
from tallystick.dev.fake_stripe.rendering import list_object, render
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

Handler = Callable[["Account", "Call"], Object]

# What people call the kinds in "No such …".
SPOKEN = {"payment_method": "PaymentMethod", "billing.meter": "billing meter", "entitlements.feature": "feature"}


@dataclass(frozen=True)
class Route:
    """A call: `{id}` in the path matches one segment."""

    method: str
    path: str
    handle: Handler
    params: str | type
    """The TypedDict of its parameters: a class, or a name below `stripe.params`."""
    takes: str = ""
    """The parameters that the fake acts on, apart by blanks. Stripe has more: those are refused, never ignored."""
    legacy: bool = False
    """Whether the call left the API in 2025-03-31.basil, and answers to older versions only."""


def supported(route: Route) -> frozenset[str]:
    """The parameters that a route acts on; lists take cursors and everything takes `expand`."""
    return frozenset(route.takes.split()) | {"expand"}


PAGING = "limit starting_after ending_before"


def find(account: Account, kind: str, object_id: Any, param: str = "id", status: int = 404) -> Object:
    """An object by id. Raises StripeError `resource_missing`: 404 for an id in the path, 400 for one in a parameter."""
    found = account.state.get(kind, str(object_id))
    if found is None or (found.get("deleted") and status == 400):
        raise missing(SPOKEN.get(kind, kind.replace("_", " ")), str(object_id), param, status)
    return found


def named(account: Account, call: Call, kind: str, param: str) -> Object:
    """The object that a parameter names. Raises StripeError 400 when there is none."""
    if not call.params.get(param):
        raise invalid(f"Missing required param: {param}.", param=param, code="parameter_missing")
    return find(account, kind, call.params[param], param, status=400)


def retrieving(kind: str) -> Handler:
    """A handler that answers with the object in the path."""
    return lambda account, call: render(account, find(account, kind, call.arguments["id"]))


def page(account: Account, call: Call, newest_first: Iterable[Object]) -> Object:
    """One page of a list: `limit` 1 to 100 (10), `starting_after` or `ending_before` an id in the list."""
    params = call.params
    limit = params.get("limit", 10)
    if not 1 <= limit <= 100:
        raise invalid("This value must be between 1 and 100.", param="limit", code="parameter_invalid_integer")
    entries = list(newest_first)
    after, before = params.get("starting_after"), params.get("ending_before")
    if after and before:
        raise invalid("You may only specify one of these parameters: starting_after, ending_before.")
    if after:
        entries = entries[_position(entries, after, "starting_after") + 1 :]
    if before:
        entries = entries[: _position(entries, before, "ending_before")]
        shown = entries[-limit:]
    else:
        shown = entries[:limit]
    return list_object([render(account, entry) for entry in shown], call.path, has_more=len(entries) > limit)


def _position(entries: list[Object], object_id: str, param: str) -> int:
    for position, entry in enumerate(entries):
        if entry["id"] == object_id:
            return position
    raise missing("object", object_id, param)


def listing(kind: str, *equal: str, created: bool = True) -> Handler:
    """A handler that lists all objects of a kind, narrowed by parameters that must equal fields of the same name."""

    def handle(account: Account, call: Call) -> Object:
        wanted = {name: call.params[name] for name in equal if name in call.params}
        entries: Iterable[Object] = account.state.newest_first(kind)
        if "customer" in wanted:
            entries = reversed(account.state.where(kind, "customer", wanted["customer"]))
        within = call.params.get("created") if created else None
        return page(
            account,
            call,
            (
                entry
                for entry in entries
                if not entry.get("deleted")
                and all(entry[name] == value for name, value in wanted.items())
                and (within is None or in_range(entry["created"], within))
            ),
        )

    return handle


def in_range(moment: int, wanted: int | dict[str, int] | None) -> bool:
    """Whether a time meets a `created` filter: a time, or any of gt, gte, lt, lte."""
    if wanted is None:
        return True
    if isinstance(wanted, int):
        return moment == wanted
    return (
        moment > wanted.get("gt", moment - 1)
        and moment >= wanted.get("gte", moment)
        and moment < wanted.get("lt", moment + 1)
        and moment <= wanted.get("lte", moment)
    )


def merge_metadata(item: Object, params: Object) -> None:
    """Merges `metadata` as Stripe does: an empty value takes a key away, an empty whole takes all away."""
    given = params.get("metadata")
    if given == "":
        item["metadata"] = {}
    elif given:
        merged = {**item["metadata"], **given}
        item["metadata"] = {key: value for key, value in merged.items() if value != ""}


def set_fields(item: Object, params: Object, names: str) -> None:
    """Sets the named fields that the parameters give; an empty value unsets."""
    for name in names.split():
        if name in params:
            item[name] = None if params[name] == "" else params[name]
