from collections.abc import AsyncIterator

import pytest

from tests.notifications.receiving import Receiver, receiving


@pytest.fixture
async def product() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def other_product() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver
