"""API keys: made once, shown once, stored as a hash, asked for on every `/v1` route.

A key is `tsk_<id>_<secret>`. The secret has 256 random bits, so a plain SHA-256 is enough: there is nothing to guess.
"""

import hashlib
import hmac
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
from tallystick.errors import Forbidden, Unauthorized, Unavailable

SCOPES = ("usage:write", "usage:read", "access:read", "portal:create", "customers:write", "admin")

# How long a revoked key may still work, against one query a request.
FRESH_FOR = timedelta(seconds=10)
# While PostgreSQL is away, usage is still taken into Redis from keys that were valid at most this long ago.
USABLE_FOR = timedelta(hours=1)
CACHE_SIZE = 10_000
NOTE_USE_EVERY = timedelta(minutes=1)


@dataclass(frozen=True)
class ApiKey:
    """Who calls: the key's id, the source that its usage events belong to, and what it may do."""

    id: str
    source: str
    scopes: frozenset[str]
    secret_sha256: bytes
    expires_at: datetime | None

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


@dataclass
class KeyCache:
    """Keys as last read from PostgreSQL, so that a hot route does not ask for each request."""

    entries: dict[str, tuple[datetime, ApiKey | None]] = field(default_factory=dict)
    noted: dict[str, datetime] = field(default_factory=dict)

    def put(self, key_id: str, at: datetime, key: ApiKey | None) -> None:
        if len(self.entries) >= CACHE_SIZE:
            self.entries.clear()  # only a flood of made-up ids fills it; real keys are read again
        self.entries[key_id] = (at, key)


async def create_key(
    connection: AsyncConnection, *, name: str, source: str, scopes: list[str], expires_at: datetime | None = None
) -> str:
    """Make a key and return its text, the only time that it can be seen. `scopes` are of `SCOPES`."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown:
        raise ValueError(f"unknown scope {unknown[0]!r}; there are: {', '.join(SCOPES)}")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    await connection.execute(
        text(
            "INSERT INTO api_keys (id, name, source, secret_sha256, scopes, expires_at)"
            " VALUES (:id, :name, :source, :secret_sha256, :scopes, :expires_at)"
        ),
        {
            "id": key_id,
            "name": name,
            "source": source,
            "secret_sha256": _hash(secret),
            "scopes": scopes,
            "expires_at": expires_at,
        },
    )
    return f"tsk_{key_id}_{secret}"


async def list_keys(connection: AsyncConnection) -> list[dict[str, Any]]:
    """All keys, newest first, with `state` valid, expired or revoked; never a secret or its hash."""
    rows = await connection.execute(
        text("""
            SELECT id, name, source, scopes, created_at, last_used_at, expires_at,
                   CASE WHEN revoked_at IS NOT NULL THEN 'revoked'
                        WHEN expires_at <= now() THEN 'expired' ELSE 'valid' END AS state
              FROM api_keys ORDER BY created_at DESC, id
        """)
    )
    return [dict(row) for row in rows.mappings()]


async def revoke_key(connection: AsyncConnection, key_id: str) -> bool:
    """Revoke a key by its id; true when it was valid until now. Running services follow within `FRESH_FOR`."""
    revoked = await connection.execute(
        text("UPDATE api_keys SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL"), {"id": key_id}
    )
    return revoked.rowcount == 1


async def authenticate(request: Request, scope: str) -> ApiKey:
    """The key of `Authorization: Bearer tsk_…` (RFC 6750), if it is valid and has `scope`.

    Raises `Unauthorized` (401), `Forbidden` (403), or `Unavailable` (503) when the key is not known here and
    PostgreSQL is away.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    parts = token.strip().split("_", 2)
    if scheme.lower() != "bearer" or len(parts) != 3 or parts[0] != "tsk":
        raise Unauthorized("Send the API key as: Authorization: Bearer tsk_…")
    key_id, secret = parts[1], parts[2]
    if not key_id.isalnum():
        raise Unauthorized("The API key is not valid. It may have been revoked, or have expired.")
    now = datetime.now(UTC)
    key = await _find_key(request.app.state.keys, request.app.state.resources.engine, key_id, now)
    # The comparison runs for unknown ids too, and takes the same time wherever the first difference lies.
    matches = hmac.compare_digest(_hash(secret), key.secret_sha256 if key else bytes(32))
    if key is None or not matches or (key.expires_at is not None and key.expires_at <= now):
        raise Unauthorized("The API key is not valid. It may have been revoked, or have expired.")
    if not key.allows(scope):
        raise Forbidden(f"This API key lacks the scope {scope}.")
    await _note_use(request.app.state.keys, request.app.state.resources.engine, key.id, now)
    return key


def require_scope(scope: str) -> Callable[[Request], Awaitable[ApiKey]]:
    """The FastAPI dependency that lets in only keys with `scope`."""

    async def dependency(request: Request) -> ApiKey:
        return await authenticate(request, scope)

    return dependency


# Only for the OpenAPI document: it shows the lock and the form of the header. `authenticate` does the work.
bearer = Security(HTTPBearer(auto_error=False, description="An API key made with `tallystick keys create`"))


async def _find_key(cache: KeyCache, engine: AsyncEngine, key_id: str, now: datetime) -> ApiKey | None:
    known = cache.entries.get(key_id)
    if known is not None and now - known[0] < FRESH_FOR:
        return known[1]
    try:
        async with db.transaction(engine) as connection:
            key = await _read_key(connection, key_id)
    except db.STORAGE_ERRORS as error:
        if known is not None and now - known[0] < USABLE_FOR:
            return known[1]
        raise Unavailable("API keys cannot be checked right now.", retry_after_seconds=2) from error
    cache.put(key_id, now, key)
    return key


async def _read_key(connection: AsyncConnection, key_id: str) -> ApiKey | None:
    found = await connection.execute(
        text(
            "SELECT id, source, scopes, secret_sha256, expires_at FROM api_keys WHERE id = :id AND revoked_at IS NULL"
        ),
        {"id": key_id},
    )
    row = found.one_or_none()
    if row is None:
        return None
    return ApiKey(row.id, row.source, frozenset(row.scopes), bytes(row.secret_sha256), row.expires_at)


async def _note_use(cache: KeyCache, engine: AsyncEngine, key_id: str, now: datetime) -> None:
    """Keep `last_used_at` right to the minute, which is enough for "may this key be revoked?"."""
    if now - cache.noted.get(key_id, datetime.min.replace(tzinfo=UTC)) < NOTE_USE_EVERY:
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
        return  # a note for people; the request itself does not depend on it


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
