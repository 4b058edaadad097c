"""End users: whom a frontend acts for, by a JSON Web Token (RFC 7519) of the product's own identity provider.

The token is signed with a key of the provider's key set (JWKS, RFC 7517), or with a secret shared with the product.
What is believed of it was pinned by the settings before it came: the algorithms, the issuer, the audience, and the
claim that holds the customer's reference. What a token's header says about where keys can be found is never followed.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import httpx
import jwt
import structlog

from tallystick.config import Settings
from tallystick.errors import Forbidden, Unauthorized, Unavailable

log = structlog.get_logger()

SHARED_SECRET_ALGORITHM = "HS256"  # noqa: S105  the name of an algorithm
# Clocks of two well-kept machines differ by less.
LEEWAY = timedelta(seconds=30)
MAX_TOKEN_CHARACTERS = 8_192
MAX_REFERENCE = 100

# A key that the provider has withdrawn is refused after this long at the latest …
REREAD_EVERY = timedelta(minutes=10)
# … unless its key set cannot be read: known keys are believed for a day, longer than providers are away.
USABLE_FOR = timedelta(hours=24)
# Tokens with made-up key ids must not make this service knock at the provider's door all the time.
PAUSE = timedelta(seconds=10)
READ_WITHIN_SECONDS = 5
MAX_KEY_SET_BYTES = 256 * 1024
MAX_KEYS = 100

LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class EndUser:
    """Whom a valid token was made out for: the product's reference of the customer."""

    reference: str


class KeySetUnreadable(Exception):
    """The provider's key set could not be read; the text is for the log."""


@dataclass
class EndUsers:
    """Checks tokens by the settings, and keeps the provider's keys as last read."""

    settings: Settings
    keys: dict[tuple[str, str], jwt.PyJWK] = field(default_factory=dict)  # by key id and algorithm
    read_at: datetime = LONG_AGO
    tried_at: datetime = LONG_AGO
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def are_served(self) -> bool:
        """Whether the settings say how tokens are checked; without that, only API keys are let in."""
        return self.settings.jwt_jwks_url is not None or self.settings.jwt_secret is not None

    async def identify(self, token: str, now: datetime) -> EndUser:
        """The user of a token.

        Raises `Unauthorized` (401), `Forbidden` (403) when it names no customer, or `Unavailable` (503) when the key
        that signed it is not known and the key set cannot be read.
        """
        header = _read_header(token)
        algorithm = header.get("alg")
        key: jwt.PyJWK | str
        if self.settings.jwt_secret is not None:
            if algorithm != SHARED_SECRET_ALGORITHM:
                _refuse("algorithm")
            key = self.settings.jwt_secret.get_secret_value()
        else:
            kid = header.get("kid")
            if algorithm not in self.settings.jwt_algorithms:
                _refuse("algorithm")
            if not isinstance(kid, str):
                _refuse("no key id")
            key = await self._find_key(kid, algorithm, now)
        return EndUser(self._read_reference(self._verify(token, key, algorithm)))

    def _verify(self, token: str, key: jwt.PyJWK | str, algorithm: str) -> Mapping[str, Any]:
        """The claims, after the signature and `aud`, `iss`, `exp`, `nbf` and `iat` were found right."""
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self.settings.jwt_audience,
                issuer=self.settings.jwt_issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "aud", "iss"], "enforce_minimum_key_length": True},
            )
        except jwt.ExpiredSignatureError:
            _refuse("expired", "The token has expired.")
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            _refuse(type(error).__name__)

    def _read_reference(self, claims: Mapping[str, Any]) -> str:
        value = claims.get(self.settings.jwt_customer_claim)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_REFERENCE or not value.isprintable():
            raise Forbidden("The token names no customer.", type="no-customer")
        if value.startswith("cus_"):
            # Whoever may choose his own name at the provider could name a customer of Stripe's so.
            raise Forbidden("The token names a Stripe customer instead of your own reference.", type="no-customer")
        return value

    async def _find_key(self, kid: str, algorithm: str, now: datetime) -> jwt.PyJWK:
        if not self._knows(kid) or now - self.read_at > REREAD_EVERY:
            async with self.reading:
                if now - self.tried_at > PAUSE:
                    await self._read_key_set(now)
        failed = self.tried_at > self.read_at
        if failed and (not self._knows(kid) or now - self.read_at > USABLE_FOR):
            raise Unavailable(
                "The keys that tokens are checked with cannot be read right now.",
                type="keys-unavailable",
                retry_after_seconds=PAUSE.seconds,
            )
        key = self.keys.get((kid, algorithm))
        if key is None:
            _refuse("unknown key")
        return key

    def _knows(self, kid: str) -> bool:
        return any(known == kid for known, _ in self.keys)

    async def _read_key_set(self, now: datetime) -> None:
        """Read the keys again; those that are known stay when it fails."""
        self.tried_at = now
        assert self.settings.jwt_jwks_url is not None
        try:
            raw = await _fetch(self.settings.jwt_jwks_url)
            self.keys = _read_keys(raw, self.settings.jwt_algorithms)
            self.read_at = now
        except (KeySetUnreadable, httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            reason = str(error) if isinstance(error, KeySetUnreadable) else type(error).__name__
            log.warning("jwks_not_read", reason=reason)


def _read_header(token: str) -> Mapping[str, Any]:
    if len(token) > MAX_TOKEN_CHARACTERS:
        _refuse("too long")
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        _refuse(type(error).__name__)
    if "crit" in header:
        _refuse("critical header")  # RFC 7515, 4.1.11: none of its extensions is understood here
    return header


async def _fetch(url: str) -> bytes:
    # Not compressed, or a small answer could become a large one; not redirected, or http:// could come into it.
    headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
    async with (
        asyncio.timeout(READ_WITHIN_SECONDS),
        httpx.AsyncClient(timeout=READ_WITHIN_SECONDS, follow_redirects=False) as client,
        client.stream("GET", url, headers=headers) as answer,
    ):
        if answer.status_code != 200:
            raise KeySetUnreadable(f"answered {answer.status_code}")
        raw = b""
        async for chunk in answer.aiter_raw():
            raw += chunk
            if len(raw) > MAX_KEY_SET_BYTES:
                raise KeySetUnreadable(f"more than {MAX_KEY_SET_BYTES} bytes")
        return raw


def _read_keys(raw: bytes, algorithms: tuple[str, ...]) -> dict[tuple[str, str], jwt.PyJWK]:
    """The public signature keys of a key set, each with the pinned algorithms that it may be used with."""
    try:
        listed = json.loads(raw)["keys"]
        candidates = [key for key in listed if isinstance(key, dict)][:MAX_KEYS]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise KeySetUnreadable("not a key set") from None
    found: dict[tuple[str, str], jwt.PyJWK] = {}
    for candidate in candidates:
        kid = candidate.get("kid")
        if not isinstance(kid, str) or candidate.get("use", "sig") != "sig":
            continue
        if "d" in candidate:
            continue  # a private key, which by being here has become everybody's
        # An RSA key that names no algorithm may be used with any of the pinned ones for RSA.
        of_rsa = [name for name in algorithms if name[:2] in ("RS", "PS")]
        for name in of_rsa if candidate.get("kty") == "RSA" and "alg" not in candidate else [None]:
            try:
                key = jwt.PyJWK(candidate, name)
            except (jwt.PyJWTError, ValueError, TypeError):
                continue  # of a kind that is not understood; its tokens are refused as signed with an unknown key
            if key.algorithm_name in algorithms:
                found[kid, key.algorithm_name] = key
    if not found:
        raise KeySetUnreadable("no usable key")
    return found


def _refuse(reason: str, detail: str = "The token is not valid.") -> NoReturn:
    log.info("end_user_refused", reason=reason)
    raise Unauthorized(detail) from None
