from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fastapi import FastAPI

from tallystick import auth, db
from tallystick.auth import create_key, list_keys, revoke_key
from tallystick.resources import Resources
from tests.conftest import open_client
from tests.usage.making import read_all

ASK = "/v1/usage?customer=acme"


async def make_key(resources: Resources, **changed: object) -> str:
    values: dict[str, object] = {"name": "reader", "source": "reader", "scopes": ["usage:read"]}
    async with db.transaction(resources.engine) as connection:
        return await create_key(connection, **(values | changed))  # type: ignore[arg-type]


async def ask(app: FastAPI, key: str) -> httpx.Response:
    async with open_client(app, key) as client:
        return await client.get(ASK)


async def test_only_a_hash_of_a_key_is_stored(resources: Resources) -> None:
    key = await make_key(resources)
    (row,) = await read_all(resources, "SELECT k::text FROM api_keys k")
    assert key.split("_", 2)[2] not in str(row)


async def test_a_key_with_another_secret_is_refused(app: FastAPI, resources: Resources) -> None:
    key = await make_key(resources)
    assert (await ask(app, key)).status_code == 200
    assert (await ask(app, key[:-1] + ("a" if key[-1] != "a" else "b"))).status_code == 401


async def test_an_expired_key_is_refused(app: FastAPI, resources: Resources) -> None:
    key = await make_key(resources, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert (await ask(app, key)).status_code == 401


async def test_a_revoked_key_is_refused_once_the_process_asks_again(
    app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await make_key(resources)
    assert (await ask(app, key)).status_code == 200
    async with db.transaction(resources.engine) as connection:
        assert await revoke_key(connection, key.split("_")[1])
        assert not await revoke_key(connection, key.split("_")[1])
    monkeypatch.setattr(auth, "FRESH_FOR", timedelta(0))
    assert (await ask(app, key)).status_code == 401


async def test_the_last_use_is_shown_and_the_secret_is_not(app: FastAPI, resources: Resources) -> None:
    key = await make_key(resources)
    await ask(app, key)
    async with db.transaction(resources.engine) as connection:
        (listed,) = await list_keys(connection)
    assert (listed["name"], listed["state"]) == ("reader", "valid")
    assert listed["last_used_at"] is not None
    assert "secret_sha256" not in listed


async def test_a_scope_that_does_not_exist_is_refused_by_name(resources: Resources) -> None:
    with pytest.raises(ValueError, match="unknown scope 'usage:all'"):
        await make_key(resources, scopes=["usage:all"])


async def test_every_v1_route_needs_a_key(app: FastAPI, anonymous: httpx.AsyncClient) -> None:
    asked = 0
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            if path.startswith("/v1/"):
                answer = await anonymous.request(method, path.replace("{ref}", "acme"), json={})
                assert answer.status_code == 401, (method, path)
                asked += 1
    assert asked >= 5
