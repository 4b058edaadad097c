"""Tokens of end users, and the provider that signs them: its keys, and its key set behind a real socket."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.serving import serve

ISSUER = "https://login.example.com/"
AUDIENCE = "tallystick"
SHARED_SECRET = "a secret that the product and this service share"

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_PUBLIC_PEM = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def make_claims(**changed: object) -> dict[str, Any]:
    """What a good token says, changed; a claim set to None is left out."""
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "acme", "iat": now, "exp": now + 300} | changed
    return {name: value for name, value in claims.items() if value is not None}


def make_token(
    claims: dict[str, Any] | None = None,
    *,
    key: Any = RSA_KEY,
    algorithm: str = "RS256",
    headers: dict[str, Any] | None = None,
) -> str:
    return jwt.encode(
        claims or make_claims(), key, algorithm=algorithm, headers={"kid": "rsa-1"} if headers is None else headers
    )


def public_key(key: Any, kid: str, **changed: object) -> dict[str, Any]:
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return json.loads(algorithm.to_jwk(key.public_key())) | {"kid": kid, "use": "sig"} | changed  # type: ignore[no-any-return]


KEYS = (public_key(RSA_KEY, "rsa-1"), public_key(EC_KEY, "ec-1"))


@dataclass
class Provider:
    """An identity provider's key set, with what it answers and how often it was asked."""

    url: str = ""
    keys: list[dict[str, Any]] = field(
        default_factory=lambda: [public_key(RSA_KEY, "rsa-1"), public_key(EC_KEY, "ec-1")]
    )
    answer: Response | None = None
    asked: int = 0


@asynccontextmanager
async def open_provider() -> AsyncIterator[Provider]:
    provider = Provider()

    async def get_keys(request: Request) -> Response:
        provider.asked += 1
        answer = provider.answer if request.url.path == "/keys" else None
        return answer or Response(json.dumps({"keys": provider.keys}), media_type="application/json")

    async with serve(Starlette(routes=[Route("/keys", get_keys), Route("/moved", get_keys)])) as url:
        provider.url = f"{url}/keys"
        yield provider
