from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from tallystick.config import Settings
from tallystick.resources import Resources, open_resources
from tests.serving import serve
from tests.webhooks.held_stripe import Stripe


@pytest.fixture
async def stripe() -> AsyncIterator[tuple[Stripe, str]]:
    """A Stripe whose answers the test holds back and lets go."""
    state = Stripe()
    async with serve(Starlette(routes=[Route("/{path:path}", state.answer)])) as url:
        yield state, url


@pytest.fixture
async def mirror(stripe: tuple[Stripe, str], settings: Settings, resources: Resources) -> AsyncIterator[Resources]:
    """The same stores, with that Stripe."""
    changed = settings.model_copy(update={"stripe_api_base": stripe[1]})
    async with open_resources(changed, application_name="tests") as opened:
        yield opened
