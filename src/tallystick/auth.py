"""API keys: made once, shown once, stored as a hash, asked for on every `/v1` route.

A key is `tsk_<id>_<secret>`. The secret has 256 random bits, so a plain SHA-256 is enough: there is nothing to guess.
A key that is rolled keeps its id, source and scopes and gets a new secret; the old one works until an overlap ends.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tallystick import db
from tallystick.card_numbers import holds_card_number
from tallystick.errors import Forbidden, RateLimited, Unauthorized, Unavailable
from tallystick.limits import Limiter

SCOPES = ("usage:write", "usage:read", "access:read", "portal:create", "customers:write", "admin")

# How long a revoked key may still work while PostgreSQL can be asked, against one query a request.
FRESH_FOR = timedelta(seconds=10)
# A secret that does not match may be a new one: its key is read again, but not for each guess of an attacker.
FRESH_FOR_A_REFUSAL = timedelta(seconds=1)
# While PostgreSQL is away, usage is still taken into Redis from keys that were valid at most this long ago.
USABLE_FOR = timedelta(hours=1)
# One that hangs costs each who asks it seconds. Meanwhile keys are used as they are known, and one request asks again.
ASK_AGAIN_AFTER = timedelta(seconds=5)
CACHE_SIZE = 10_000
NOTE_USE_EVERY = timedelta(minutes=1)

# The source stands with each event's id in the ledger's indexes, and `?source=` takes no more.
MAX_NAME = 100

KEY_PREFIX = "tsk_"
KEY_ID = re.compile(r"[0-9a-f]{12}")  # as `create_key` makes them
NOT_VALID = "The API key is not valid. It may have been revoked, or have expired."
NO_HASH = bytes(32)  # compared with where there is none; nobody knows a secret whose SHA-256 it is

INSERT_KEY = text("""
    INSERT INTO api_keys (id, name, source, secret_sha256, scopes, expires_at, limit_per_second)
    VALUES (:id, :name, :source, :secret_sha256, :scopes, :expires_at, :limit_per_second)
""")

LIST_KEYS = text("""
    SELECT id, name, source, scopes, limit_per_second, created_at, last_used_at, expires_at, rolled_at,
           CASE WHEN old_valid_until > now() THEN old_valid_until END AS old_valid_until,
           CASE WHEN revoked_at IS NOT NULL THEN 'revoked'
                WHEN expires_at <= now() THEN 'expired' ELSE 'valid' END AS state
      FROM api_keys ORDER BY created_at DESC, id
""")

# The secret before the last one, if it still worked, ends here: two are valid at once, never three.
ROLL_KEY = text("""
    UPDATE api_keys
       SET old_secret_sha256 = secret_sha256, old_valid_until = :old_valid_until, secret_sha256 = :secret_sha256,
           rolled_at = :now
     WHERE id = :id AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > :now)
""")

FIND_KEY = text("""
    SELECT id, source, scopes, secret_sha256, expires_at, old_secret_sha256, old_valid_until, limit_per_second
      FROM api_keys WHERE id = :id AND revoked_at IS NULL
""")


@dataclass(frozen=True)
class ApiKey:
    """Who calls: the key's id, the source that its usage events belong to, and what it may do."""

    id: str
    source: str
    scopes: frozenset[str]
    secret_sha256: bytes
    expires_at: datetime | None
    old_secret_sha256: bytes | None = None
    old_valid_until: datetime | None = None
    limit_per_second: int | None = None

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


@dataclass
class KeyCache:
    """Keys as last read from PostgreSQL, so that a hot route does not ask for each request.

    `ask_again_at`: PostgreSQL failed lately, and it is not asked for known keys until then; None while it works.
    """

    entries: dict[str, tuple[datetime, ApiKey | None]] = field(default_factory=dict)
    noted: dict[str, datetime] = field(default_factory=dict)
    ask_again_at: datetime | None = None
    limiter: Limiter = field(default_factory=Limiter)

    def usable_for(self, now: datetime) -> timedelta:
        """How long ago a key may have been read to be used without asking again."""
        return USABLE_FOR if self.ask_again_at is not None and now < self.ask_again_at else FRESH_FOR

    def put(self, key_id: str, at: datetime, key: ApiKey | None) -> None:
        if len(self.entries) >= CACHE_SIZE:
            self.entries.clear()  # only a flood of made-up ids fills it; real keys are read again
        self.entries[key_id] = (at, key)


async def create_key(
    connection: AsyncConnection,
    *,
    name: str,
    source: str,
    scopes: list[str],
    expires_at: datetime | None = None,
    limit_per_second: int | None = None,
) -> str:
    """Make a key and return its text, the only time that it can be seen.

    `name` and `source` have up to 100 printable characters, `scopes` are of `SCOPES`; `limit_per_second` counts
    requests in each process of the API. Raises `ValueError`.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown:
        raise ValueError(f"unknown scope {unknown[0]!r}; there are: {', '.join(SCOPES)}")
    for what, given in (("name", name), ("source", source)):
        if not 1 <= len(given) <= MAX_NAME or not given.isprintable():
            raise ValueError(f"the {what} must have 1 to {MAX_NAME} characters, all of them printable")
    if holds_card_number(name) or holds_card_number(source):
        raise ValueError("the name or the source looks like a card number, and card numbers are not kept here")
    key_id, secret = secrets.token_hex(6), _new_secret()
    values = {"id": key_id, "name": name, "source": source, "secret_sha256": _hash(secret), "scopes": scopes}
    await connection.execute(INSERT_KEY, values | {"expires_at": expires_at, "limit_per_second": limit_per_second})
    return f"{KEY_PREFIX}{key_id}_{secret}"


async def list_keys(connection: AsyncConnection) -> list[dict[str, Any]]:
    """All keys, newest first, with `state` valid, expired or revoked; never a secret or its hash.

    `old_valid_until` is set while the secret before the last roll still works.
    """
    return [dict(row) for row in (await connection.execute(LIST_KEYS)).mappings()]


async def roll_key(connection: AsyncConnection, key_id: str, overlap: timedelta, now: datetime) -> str | None:
    """Give a key a new secret and return its text, once; None when there is no valid key with this id.

    The old secret works for `overlap` from now. Running services follow within `FRESH_FOR`.
    """
    secret = _new_secret()
    values = {"id": key_id, "secret_sha256": _hash(secret), "old_valid_until": now + overlap, "now": now}
    rolled = await connection.execute(ROLL_KEY, values)
    return f"{KEY_PREFIX}{key_id}_{secret}" if rolled.rowcount == 1 else None


async def revoke_key(connection: AsyncConnection, key_id: str) -> bool:
    """Revoke a key by its id; true when it was valid until now. Running services follow within `FRESH_FOR`."""
    revoked = await connection.execute(
        text("UPDATE api_keys SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL"), {"id": key_id}
    )
    return revoked.rowcount == 1


async def authenticate(request: Request, scope: str) -> ApiKey:
    """The key of `Authorization: Bearer tsk_…` (RFC 6750), if it is valid, has `scope` and is within its limit.

    Raises `Unauthorized` (401), `Forbidden` (403), `RateLimited` (429), or `Unavailable` (503) when the key is not
    known here and PostgreSQL is away.
    """
    parts = (bearer_token(request) or "").split("_", 2)
    if len(parts) != 3 or parts[0] + "_" != KEY_PREFIX:
        raise Unauthorized("Send the API key as: Authorization: Bearer tsk_…")
    key_id, secret = parts[1], parts[2]
    now = datetime.now(UTC)
    keys: KeyCache = request.app.state.keys
    engine: AsyncEngine = request.app.state.resources.engine
    key = await _find_key(keys, engine, key_id, now, keys.usable_for(now))
    if not _matches(secret, key, now):
        key = await _find_key(keys, engine, key_id, now, FRESH_FOR_A_REFUSAL)
        if not _matches(secret, key, now):
            raise Unauthorized(NOT_VALID)
    if key is None or (key.expires_at is not None and key.expires_at <= now):
        raise Unauthorized(NOT_VALID)
    if not key.allows(scope):
        raise Forbidden(f"This API key lacks the scope {scope}.")
    if key.limit_per_second is not None and not keys.limiter.admit(key.id, key.limit_per_second, now):
        raise RateLimited(f"This API key may send {key.limit_per_second} requests a second.", retry_after_seconds=1)
    await _note_use(keys, engine, key.id, now)
    return key


def bearer_token(request: Request) -> str | None:
    """What follows `Authorization: Bearer`, of whatever kind; None without it."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def require_scope(scope: str) -> Callable[[Request], Awaitable[ApiKey]]:
    """The FastAPI dependency that lets in only keys with `scope`."""

    async def dependency(request: Request) -> ApiKey:
        return await authenticate(request, scope)

    return dependency


# Only for the OpenAPI document: it shows the lock and the form of the header. `authenticate` does the work.
bearer = Security(
    HTTPBearer(
        auto_error=False,
        description="An API key made with `tallystick keys create`; for the portal, an end user's token too.",
    )
)


async def _find_key(
    cache: KeyCache, engine: AsyncEngine, key_id: str, now: datetime, fresh_for: timedelta
) -> ApiKey | None:
    known = cache.entries.get(key_id)
    if known is not None and now - known[0] < fresh_for:
        return known[1]
    if not KEY_ID.fullmatch(key_id):  # neither asked for nor remembered, however long it is
        return None
    if cache.ask_again_at is not None:
        cache.ask_again_at = now + ASK_AGAIN_AFTER  # so that nobody else waits with this request
    try:
        async with db.transaction(engine) as connection:
            key = await _read_key(connection, key_id)
    except db.STORAGE_ERRORS as error:
        cache.ask_again_at = datetime.now(UTC) + ASK_AGAIN_AFTER  # it may have taken seconds to fail
        if known is not None and now - known[0] < USABLE_FOR:
            return known[1]
        raise Unavailable("API keys cannot be checked right now.", retry_after_seconds=2) from error
    cache.ask_again_at = None
    cache.put(key_id, now, key)
    return key


async def _read_key(connection: AsyncConnection, key_id: str) -> ApiKey | None:
    row = (await connection.execute(FIND_KEY, {"id": key_id})).one_or_none()
    if row is None:
        return None
    return ApiKey(
        row.id,
        row.source,
        frozenset(row.scopes),
        bytes(row.secret_sha256),
        row.expires_at,
        bytes(row.old_secret_sha256) if row.old_secret_sha256 is not None else None,
        row.old_valid_until,
        row.limit_per_second,
    )


def _matches(secret: str, key: ApiKey | None, now: datetime) -> bool:
    """Whether the secret is the key's, or the one before it while that is valid.

    Both comparisons run for unknown ids too, and take the same time wherever the first difference lies.
    """
    given = _hash(secret)
    is_present = hmac.compare_digest(given, key.secret_sha256 if key else NO_HASH)
    is_old = hmac.compare_digest(given, (key.old_secret_sha256 if key else None) or NO_HASH)
    return is_present or (is_old and key is not None and key.old_valid_until is not None and now < key.old_valid_until)


async def _note_use(cache: KeyCache, engine: AsyncEngine, key_id: str, now: datetime) -> None:
    """Keep `last_used_at` right to the minute, which is enough for "may this key be revoked?"."""
    noted = cache.noted.get(key_id)
    if cache.ask_again_at is not None or (noted is not None and now - noted < NOTE_USE_EVERY):
        return
    cache.noted[key_id] = now
    try:
        async with db.transaction(engine) as connection:
            await connection.execute(
                text(
                    "UPDATE api_keys SET last_used_at = :now"
                    " WHERE id = (SELECT id FROM api_keys WHERE id = :id FOR UPDATE SKIP LOCKED)"
                ),
                {"id": key_id, "now": now},
            )
    except db.STORAGE_ERRORS:
        # A note for people; the request itself does not depend on it.
        cache.ask_again_at = datetime.now(UTC) + ASK_AGAIN_AFTER


def _new_secret() -> str:
    return secrets.token_urlsafe(32)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
