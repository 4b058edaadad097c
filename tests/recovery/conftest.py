from collections.abc import AsyncIterator

import httpx
import pytest

from tallystick.resources import Resources
from tallystick.webhooks import drift
from tests.conftest import FakeStripe
from tests.recovery.shop import Shop, open_shop, receiving


@pytest.fixture
async def shop(fake_stripe: FakeStripe) -> Shop:
    """A shop whose webhooks go nowhere."""
    return await open_shop(fake_stripe)


@pytest.fixture
async def webhooks(shop: Shop, resources: Resources) -> AsyncIterator[httpx.AsyncClient]:
    """The application, receiving the shop's webhooks from now on."""
    async with receiving(shop, resources) as client:
        yield client


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests know when a webhook has arrived, and need not wait for those that may be on their way."""
    monkeypatch.setattr(drift, "PAUSE_SECONDS", 0)
