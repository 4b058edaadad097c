"""Requests made up from the OpenAPI document, valid and not: none is answered 5xx, and every refusal is a problem."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tallystick import db
from tallystick.app import create_app
from tallystick.auth import SCOPES, create_key
from tallystick.resources import open_resources
from tests.conftest import Servers, empty_stores, make_settings
from tests.serving import serve_in_thread

# A webhook is answered 500 when storage fails, and nothing here makes it fail; 503 is for parts that are away.
NEVER = range(500, 600)


@pytest.fixture(scope="module")
def served(servers: Servers, fake_stripe_url: str) -> Iterator[tuple[str, str]]:
    """The application behind a socket, and a key with every scope."""
    own = make_settings(
        database_url=servers.postgres.url, redis_url=servers.valkey.url, stripe_api_base=fake_stripe_url
    )

    async def prepare() -> str:
        async with open_resources(own, application_name="tests") as resources:
            await empty_stores(resources)
            async with db.transaction(resources.engine) as connection:
                return await create_key(connection, name="any", source="any", scopes=list(SCOPES))

    key = asyncio.run(prepare())
    with serve_in_thread(create_app(own)) as url:
        yield url, key


any_request = schemathesis.openapi.from_dict(create_app(make_settings()).openapi())


# NDJSON is made up by tests/usage/test_formats.py; schemathesis has no serializer for it, and says so.
@pytest.mark.filterwarnings("ignore:Skipped test cases with unsupported payload media types:UserWarning")
@any_request.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_is_answered_with_a_server_error(case: Any, served: tuple[str, str]) -> None:
    answer = case.call(base_url=served[0], headers={"Authorization": f"Bearer {served[1]}"})
    assert answer.status_code not in NEVER, answer.text
    if answer.status_code >= 400:
        kind = answer.headers["content-type"][0]
        usage_refused = answer.status_code == 422 and case.path == "/v1/usage" and case.method == "POST"
        assert kind == "application/problem+json" or usage_refused, kind
