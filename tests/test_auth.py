import ast
import hashlib
import hmac
import inspect
import textwrap
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fastapi import FastAPI

from tallystick import auth, db
from tallystick.auth import create_key, list_keys, revoke_key, roll_key
from tallystick.limits import MAX_REMEMBERED, Limiter
from tallystick.resources import Resources
from tests.conftest import open_client
from tests.usage.making import METER, make_customer, make_meter, read_all

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


async def test_ids_that_were_never_given_out_are_neither_looked_up_nor_remembered(app: FastAPI) -> None:
    known = app.state.keys.entries
    for key_id in ("a", "0123456789AB", "0123456789abc", "0" * 4_000):
        assert (await ask(app, f"tsk_{key_id}_secret")).status_code == 401
    assert not known
    assert (await ask(app, "tsk_0123456789ab_secret")).status_code == 401
    assert list(known) == ["0123456789ab"]  # that one may have been given out


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


@pytest.mark.parametrize("source", ["", "x" * 101, "a\x01b"])
async def test_a_source_that_the_ledger_could_not_keep_is_refused(resources: Resources, source: str) -> None:
    with pytest.raises(ValueError, match="the source must have 1 to 100 characters"):
        await make_key(resources, source=source)


async def test_every_v1_route_needs_a_key(app: FastAPI, anonymous: httpx.AsyncClient) -> None:
    asked = 0
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            if path.startswith("/v1/"):
                answer = await anonymous.request(method, path.replace("{ref}", "acme"), json={})
                assert answer.status_code == 401, (method, path)
                asked += 1
    assert asked >= 5


async def roll(resources: Resources, key: str, overlap: timedelta, now: datetime | None = None) -> str | None:
    async with db.transaction(resources.engine) as connection:
        return await roll_key(connection, key.split("_")[1], overlap, now or datetime.now(UTC))


async def test_a_rolled_key_has_two_secrets_until_the_overlap_ends(
    app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "FRESH_FOR", timedelta(0))
    first = await make_key(resources)
    second = await roll(resources, first, timedelta(hours=1))
    assert second is not None
    assert second.split("_")[1] == first.split("_")[1]
    assert [(await ask(app, key)).status_code for key in (first, second)] == [200, 200]
    async with db.transaction(resources.engine) as connection:
        (listed,) = await list_keys(connection)
    assert listed["rolled_at"] < listed["old_valid_until"] <= datetime.now(UTC) + timedelta(hours=1)
    # Rolled long enough ago, the old secret is worth nothing.
    third = await roll(resources, first, timedelta(hours=1), datetime.now(UTC) - timedelta(hours=2))
    assert third is not None
    assert [(await ask(app, key)).status_code for key in (first, second, third)] == [401, 401, 200]


async def test_a_leaked_secret_ends_at_once_and_never_three_are_valid(
    app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "FRESH_FOR", timedelta(0))
    first = await make_key(resources)
    second = await roll(resources, first, timedelta(hours=1)) or ""
    third = await roll(resources, first, timedelta(hours=1)) or ""
    assert [(await ask(app, key)).status_code for key in (first, second, third)] == [401, 200, 200]
    fourth = await roll(resources, first, timedelta(0)) or ""
    assert [(await ask(app, key)).status_code for key in (third, fourth)] == [401, 200]


async def test_a_new_secret_works_at_once_where_the_old_one_was_just_used(
    app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "FRESH_FOR_A_REFUSAL", timedelta(0))
    first = await make_key(resources)
    assert (await ask(app, first)).status_code == 200
    second = await roll(resources, first, timedelta(hours=1)) or ""
    assert (await ask(app, second)).status_code == 200


async def test_a_key_that_is_not_valid_is_not_rolled(resources: Resources) -> None:
    expired = await make_key(resources, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked = await make_key(resources)
    async with db.transaction(resources.engine) as connection:
        await revoke_key(connection, revoked.split("_")[1])
    for key in (expired, revoked, "tsk_unknown_x"):
        assert await roll(resources, key, timedelta(hours=1)) is None


async def test_revoking_ends_both_secrets(app: FastAPI, resources: Resources) -> None:
    first = await make_key(resources)
    second = await roll(resources, first, timedelta(hours=1)) or ""
    async with db.transaction(resources.engine) as connection:
        await revoke_key(connection, first.split("_")[1])
    assert [(await ask(app, key)).status_code for key in (first, second)] == [401, 401]


async def test_a_limited_key_is_told_to_wait_and_others_are_not(app: FastAPI, resources: Resources) -> None:
    limited = await make_key(resources, limit_per_second=2)
    other = await make_key(resources)
    answers = [await ask(app, limited) for _ in range(4)]
    assert 429 in [answer.status_code for answer in answers]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert (refused.headers["retry-after"], refused.json()["type"]) == ("1", "urn:tallystick:problem:rate-limited")
    assert [(await ask(app, other)).status_code for _ in range(4)] == [200] * 4


def test_a_limit_lets_a_second_s_worth_through_and_then_so_many_a_second() -> None:
    limiter, now = Limiter(), datetime.now(UTC)
    assert [limiter.admit("a", 5, now) for _ in range(6)] == [True] * 5 + [False]
    assert limiter.admit("b", 5, now)
    assert [limiter.admit("a", 5, now + timedelta(milliseconds=200)) for _ in range(2)] == [True, False]
    passed = sum(limiter.admit("a", 5, now + timedelta(milliseconds=10 * step)) for step in range(100, 1100))
    assert 50 <= passed <= 54


def test_a_clock_that_is_set_back_does_not_lock_a_caller_out() -> None:
    limiter, now = Limiter(), datetime.now(UTC)
    assert limiter.admit("a", 1, now + timedelta(days=1))
    assert [limiter.admit("a", 1, now) for _ in range(2)] == [True, False]


def test_a_limit_remembers_only_so_many_callers() -> None:
    limiter, now = Limiter(), datetime.now(UTC)
    for number in range(MAX_REMEMBERED + 10):
        limiter.admit(str(number), 1, now + timedelta(seconds=2 * number))
    assert len(limiter.busy_until) <= MAX_REMEMBERED


async def test_a_name_that_is_a_card_number_is_not_kept(resources: Resources) -> None:
    for field in ("name", "source"):
        with pytest.raises(ValueError, match="card number"):
            await make_key(resources, **{field: "4242 4242 4242 4242"})


async def test_an_id_counts_once_for_each_source_and_tells_nothing_about_another(
    app: FastAPI, resources: Resources
) -> None:
    await make_customer(resources)
    await make_meter(resources)
    writing = ["usage:write", "usage:read"]
    ours, theirs, ours_too = [
        await make_key(resources, name=name, source=source, scopes=writing)
        for name, source in (("one", "ours"), ("two", "theirs"), ("three", "ours"))
    ]

    async def post(key: str, value: str) -> list[str]:
        event = {"id": "e1", "customer": "acme", "meter": METER, "value": value}
        async with open_client(app, key) as client:
            answer = await client.post("/v1/usage?results=all", json=event)
        return [result["result"] for result in answer.json()["results"]]

    # The other source's event under this id is neither a repeat nor in conflict, whatever it says.
    assert await post(ours, "2") == ["accepted"]
    assert await post(theirs, "3") == ["accepted"]
    assert await post(ours_too, "2") == ["duplicate"]
    assert await post(ours_too, "3") == ["conflict"]
    assert await post(theirs, "3") == ["duplicate"]
    assert await post(theirs, "2") == ["conflict"]


async def test_secrets_are_compared_as_hashes_in_constant_time_and_as_often_for_keys_that_do_not_exist(
    app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await make_key(resources)
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def note(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return compare(left, right)

    monkeypatch.setattr("tallystick.auth.hmac.compare_digest", note)
    numbers = []
    for given in (key, key[:-1] + ("x" if key[-1] != "x" else "y"), "tsk_0123456789ab_" + key.split("_", 2)[2]):
        compared.clear()
        await ask(app, given)
        numbers.append(len(compared))
        digest = hashlib.sha256(given.split("_", 2)[2].encode()).digest()
        assert all(left == digest and len(right) == len(digest) for left, right in compared)
    # Its present and its old secret; and both again, since the key might be a newer one.
    assert numbers == [2, 4, 4]


def test_nothing_but_times_is_compared_beside() -> None:
    """A plain `==` of secrets would tell by its time where the first difference lies."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(auth._matches)))
    found = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert found == ["key is not None", "key.old_valid_until is not None", "now < key.old_valid_until"]
