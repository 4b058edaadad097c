"""Reading from Stripe: patiently, within the rate limits, and to the end."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
import stripe
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.config import Settings
from tallystick.resources import Resources, open_resources
from tallystick.webhooks import reading
from tallystick.webhooks.reading import TRIES, Reader
from tallystick.webhooks.sync import sync_mirror
from tests.serving import serve
from tests.webhooks.stripe_events import customer, item, read, subscription


@dataclass
class LittleStripe:
    """Answers as it is told: `answers` by path; a number is a status, and a list is used up from its beginning."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        path = request.url.path
        self.asked.append(path)
        found = self.answers.get(path, {"object": "list", "data": [], "has_more": False})
        if isinstance(found, list):
            found = found.pop(0)
        if isinstance(found, int):
            return JSONResponse({"error": {"type": "api_error", "message": "no"}}, found)
        return JSONResponse(found)


@pytest.fixture
async def little_stripe(settings: Settings, resources: Resources) -> AsyncIterator[tuple[LittleStripe, Resources]]:
    state = LittleStripe()
    async with serve(Starlette(routes=[Route("/{path:path}", state.answer)])) as url:
        changed = settings.model_copy(update={"stripe_api_base": url})
        async with open_resources(changed, application_name="tests") as opened:
            yield state, opened


def listing(*objects: Any, more: bool = False) -> dict[str, Any]:
    return {"object": "list", "data": list(objects), "has_more": more}


async def test_what_may_pass_is_tried_again(
    little_stripe: tuple[LittleStripe, Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, resources = little_stripe
    monkeypatch.setattr(reading, "FIRST_PAUSE_SECONDS", 0.001)
    state.answers = {"/v1/products": [429, 500, 503, listing()]}

    assert await Reader(resources).page("/v1/products", None) == ([], None)
    assert len(state.asked) == 4


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_what_will_not_pass_is_not(little_stripe: tuple[LittleStripe, Resources], status: int) -> None:
    state, resources = little_stripe
    state.answers = {"/v1/products": status}

    with pytest.raises(stripe.StripeError):
        await Reader(resources).page("/v1/products", None)
    assert len(state.asked) == 1


async def test_patience_ends(little_stripe: tuple[LittleStripe, Resources], monkeypatch: pytest.MonkeyPatch) -> None:
    state, resources = little_stripe
    monkeypatch.setattr(reading, "FIRST_PAUSE_SECONDS", 0.0001)
    state.answers = {"/v1/products": 429}

    with pytest.raises(stripe.RateLimitError):
        await Reader(resources).page("/v1/products", None)
    assert len(state.asked) == TRIES


async def test_calls_are_made_no_faster_than_allowed(
    little_stripe: tuple[LittleStripe, Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, resources = little_stripe
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    # A clock that goes on only while it is slept, as if calls took no time.
    monkeypatch.setattr(reading, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(reading, "sleep", sleep)
    monkeypatch.setattr(reading, "CALLS_PER_SECOND", 10)
    reader = Reader(resources)

    for _ in range(14):
        await reader.get("/v1/products")

    # Ten at once, and four that had to wait for a tenth of a second each.
    assert sum(slept) == pytest.approx(0.4)


async def test_a_subscription_that_shows_only_some_of_its_items_has_the_rest_fetched(
    little_stripe: tuple[LittleStripe, Resources],
) -> None:
    state, resources = little_stripe
    shown = subscription(items=[item("si_1")])
    shown["items"]["has_more"] = True
    state.answers = {
        "/v1/customers": listing(customer()),
        "/v1/subscriptions": listing(shown),
        "/v1/subscription_items": listing(item("si_1"), item("si_2", "price_2")),
    }

    await sync_mirror(resources, datetime.now(UTC))

    assert await read(resources, "SELECT id FROM subscription_items ORDER BY id") == [{"id": "si_1"}, {"id": "si_2"}]
    assert await read(resources, "SELECT needs_refresh FROM subscriptions") == [{"needs_refresh": False}]
