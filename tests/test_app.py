"""What every route has in common: health, problems, the OpenAPI document."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from starlette.routing import Route

from tallystick import db
from tallystick.config import Settings
from tallystick.resources import Resources, open_resources


async def test_health_asks_no_other_part(app: FastAPI, anonymous: httpx.AsyncClient, settings: Settings) -> None:
    nowhere = settings.model_copy(update={"database_url": "postgresql+asyncpg://127.0.0.1:1/none"})
    working = app.state.resources
    async with open_resources(nowhere, application_name="tests") as app.state.resources:
        assert (await anonymous.get("/healthz")).status_code == 200
        answer = await anonymous.get("/readyz")
    app.state.resources = working
    assert answer.status_code == 503
    assert answer.json()["parts"]["redis"] == "ok"
    assert answer.json()["parts"]["postgres"].startswith("failed")


async def test_ready_when_both_stores_are_there(anonymous: httpx.AsyncClient) -> None:
    answer = await anonymous.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "parts": {"postgres": "ok", "redis": "ok"}})


async def test_without_redis_it_is_ready_and_degraded(
    app: FastAPI, anonymous: httpx.AsyncClient, settings: Settings
) -> None:
    nowhere = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    working = app.state.resources
    async with open_resources(nowhere, application_name="tests") as app.state.resources:
        answer = await anonymous.get("/readyz")
    app.state.resources = working
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")


async def test_an_older_schema_is_not_ready_and_says_what_to_do(
    anonymous: httpx.AsyncClient, resources: Resources
) -> None:
    async with db.transaction(resources.engine) as connection:
        version = await connection.scalar(text("SELECT version_num FROM alembic_version"))
        await connection.execute(text("DELETE FROM alembic_version"))
    answer = await anonymous.get("/readyz")
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("INSERT INTO alembic_version VALUES (:version)"), {"version": version})
    assert answer.status_code == 503
    assert "tallystick migrate" in answer.json()["parts"]["postgres"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("DELETE", "/v1/usage", 405)])
async def test_what_does_not_exist_is_a_problem_too(
    anonymous: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await anonymous.request(method, path)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"


async def test_storage_that_fails_in_a_request_is_a_503(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings
) -> None:
    assert (await client.get("/v1/usage?customer=acme")).status_code == 200
    nowhere = settings.model_copy(update={"database_url": "postgresql+asyncpg://127.0.0.1:1/none"})
    working = app.state.resources
    async with open_resources(nowhere, application_name="tests") as app.state.resources:
        answer = await client.get("/v1/usage?customer=acme")
    app.state.resources = working
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


async def test_a_bug_in_a_plain_route_is_a_500_that_tells_nothing(
    app: FastAPI, client: httpx.AsyncClient, anonymous: httpx.AsyncClient
) -> None:
    reader, app.state.access_reader = app.state.access_reader, "a marked secret"
    answer = await client.get("/v1/customers/acme/access")
    app.state.access_reader = reader
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:tallystick:problem:internal-error")
    assert "marked" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/webhooks/stripe", {"POST"}),
        ("GET", "/webhooks/stripe/eu", {"POST"}),
        ("PUT", "/v1/customers/acme/access", {"GET", "HEAD"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
    ],
)
async def test_another_method_of_a_plain_route_is_a_405(
    anonymous: httpx.AsyncClient, method: str, path: str, allowed: set[str]
) -> None:
    answer = await anonymous.request(method, path)
    assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, allowed)


async def test_the_document_describes_every_route(app: FastAPI, anonymous: httpx.AsyncClient) -> None:
    paths = (await anonymous.get("/openapi.json")).json()["paths"]
    included = [getattr(route, "original_router", None) for route in app.routes]
    routes = [*app.routes, *(route for router in included if router is not None for route in router.routes)]
    served = {
        (str(route.path).replace(":path}", "}"), method.lower())  # how it is matched is no part of its name
        for route in routes
        if isinstance(route, Route) and route.path not in ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc")
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert {(path, method) for path, operations in paths.items() for method in operations} == served
    for operations in paths.values():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["operationId"]


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    await client.post("/v1/usage", json={"id": "e", "customer": "acme", "meter": ""})
    answer = await client.get("/metrics")
    assert 'tallystick_usage_events_total{result="rejected"}' in answer.text


async def test_the_page_for_people_loads_nothing_and_runs_nothing(anonymous: httpx.AsyncClient) -> None:
    answer = await anonymous.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.findall(r"<script|<link|<img|<iframe|@import|url\(|\son\w+=|\bsrc=|javascript:", answer.text)
    assert not [
        link for link in re.findall(r'href="([^"]*)"', answer.text) if not link.startswith(("#", "openapi.json"))
    ]
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    assert "script" not in answer.headers["content-security-policy"]


async def test_the_page_for_people_has_every_route_and_every_schema(app: FastAPI, anonymous: httpx.AsyncClient) -> None:
    page = (await anonymous.get("/docs")).text
    document = app.openapi()
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in page
    for name in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{name}"' in page
    assert all(f'id="{name}"' in page for name in document["components"]["schemas"])


@pytest.mark.parametrize("path", ["/v1/access", "/v1/portal/sessions", "/v1/customers/acme"])
async def test_a_body_that_never_ends_is_refused_early(client: httpx.AsyncClient, path: str) -> None:
    sent = 0

    async def pour() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 16_384
            yield b" " * 16_384

    answer = await client.request("PUT" if "customers" in path else "POST", path, content=pour())
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:tallystick:problem:too-large")
    assert sent < 1_000_000


@pytest.mark.parametrize(
    ("path", "field", "said"),
    [
        (
            "/v1/usage?customer=acme&form=2026-11-01",
            "form",
            "There is no query parameter 'form'; there are: customer, m",
        ),
        ("/v1/customers/acme?ref=acme", "ref", "There is no query parameter 'ref'; there is none."),
        ("/v1/usage?customer=acme&from=2026-11-01T00:00:00+01:00", "from", "in a URL, + is written as %2B"),
        ("/v1/usage?customer=acme&to=2026-11-01T00:00:00", "to", "It must be a time with its zone"),
    ],
)
async def test_a_query_that_means_something_else_is_refused(
    client: httpx.AsyncClient, path: str, field: str, said: str
) -> None:
    answer = await client.get(path)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert said in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b'{"customer": "acme"}', {}, 415, "Send the body with the header Content-Type: application/json."),
        (b"[]", {"Content-Type": "application/json"}, 422, "It must be a JSON object."),
        (b'{"custmer": "acme"}', {"Content-Type": "application/json"}, 422, "There is no such field."),
        (
            b'{"customer": "acme", "flow_data": {"type": "subscription_cancel"}}',
            {"Content-Type": "application/json"},
            422,
            "The type subscription_cancel needs subscription_cancel.",
        ),
    ],
)
async def test_what_is_wrong_with_a_body_is_said_in_plain_words(
    client: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    answer = await client.post("/v1/portal/sessions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (status, said)


async def test_a_405_names_every_method_of_the_path(client: httpx.AsyncClient) -> None:
    answer = await client.delete("/v1/usage")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    assert answer.json()["detail"] == "There is no 'DELETE' here; there are: GET, POST."
