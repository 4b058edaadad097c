"""Which key may call which route: as the OpenAPI document says it, so that no route can be left out."""

import re
from typing import Any

import pytest
from fastapi import FastAPI

from tallystick import db
from tallystick.auth import SCOPES, create_key
from tallystick.resources import Resources
from tests.conftest import open_client

NAMED = re.compile(rf"`({'|'.join(SCOPES)})`")
WITHOUT_KEY = {
    ("POST", "/webhooks/stripe"),
    ("POST", "/webhooks/stripe/{endpoint}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
}
# Of the document itself; nothing is to be kept secret in it.
UNDOCUMENTED = {("GET", "/docs"), ("GET", "/openapi.json")}


def read_scopes(app: FastAPI) -> dict[tuple[str, str], set[str]]:
    """Each operation that needs a key, with the scopes that its description names."""
    return {
        (method.upper(), path): set(NAMED.findall(operation["description"]))
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
        if operation.get("security")
    }


def test_every_route_is_in_the_document_and_names_one_scope(app: FastAPI) -> None:
    scopes = read_scopes(app)
    documented = {
        (method.upper(), path) for path, operations in app.openapi()["paths"].items() for method in operations
    }
    assert documented == scopes.keys() | WITHOUT_KEY
    assert {key: named for key, named in scopes.items() if len(named) != 1} == {}
    assert set().union(*scopes.values()) == set(SCOPES)


def test_no_route_is_served_that_the_document_does_not_have(app: FastAPI) -> None:
    served: set[tuple[str, str]] = set()
    waiting = list(app.routes)
    while waiting:
        route: Any = waiting.pop()
        if hasattr(route, "original_router"):  # where FastAPI keeps the routes of a router
            waiting += route.original_router.routes
        else:
            path = route.path.replace(":path}", "}")
            served |= {(method, path) for method in route.methods if method != "HEAD"}
    assert served == read_scopes(app).keys() | WITHOUT_KEY | UNDOCUMENTED


@pytest.fixture
async def keys(resources: Resources) -> dict[str, str]:
    """A key for each scope, with that scope alone."""
    async with db.transaction(resources.engine) as connection:
        return {scope: await create_key(connection, name=scope, source="tests", scopes=[scope]) for scope in SCOPES}


async def test_each_route_asks_for_its_scope_and_no_other_will_do(app: FastAPI, keys: dict[str, str]) -> None:
    async with open_client(app, None) as client:
        for (method, template), named in read_scopes(app).items():
            path = re.sub(r"\{\w+\}", "x1", template)
            body: dict[str, str] | None = {} if method in ("POST", "PUT") else None
            without = await client.request(method, path, json=body)
            assert without.status_code == 401, (method, template)
            for scope, key in keys.items():
                headers = {"Authorization": f"Bearer {key}"}
                answer = await client.request(method, path, json=body, headers=headers)
                if scope in named | {"admin"}:
                    assert answer.status_code not in (401, 403), (method, template, scope)
                else:
                    assert answer.status_code == 403, (method, template, scope)
                    assert f"the scope {min(named)}." in answer.json()["detail"]
