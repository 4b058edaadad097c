"""Tokens of end users: which are believed, and what becomes of the rest."""

import base64
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import SecretStr
from starlette.responses import RedirectResponse, Response

from tallystick.end_users import LEEWAY, MAX_KEY_SET_BYTES, PAUSE, REREAD_EVERY, USABLE_FOR, EndUsers
from tallystick.errors import Forbidden, Problem, Unauthorized, Unavailable
from tests.conftest import make_settings
from tests.tokens import (
    AUDIENCE,
    EC_KEY,
    ISSUER,
    KEYS,
    RSA_KEY,
    RSA_PUBLIC_PEM,
    SHARED_SECRET,
    Provider,
    make_claims,
    make_token,
    open_provider,
    public_key,
)

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
async def served() -> AsyncIterator[Provider]:
    async with open_provider() as opened:
        yield opened


@pytest.fixture
def provider(served: Provider) -> Provider:
    """The provider as at the start of each test."""
    served.keys, served.answer, served.asked = list(KEYS), None, 0
    return served


def by_key_set(url: str, **changed: object) -> EndUsers:
    pinned = {"jwt_jwks_url": url, "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}
    return EndUsers(make_settings(**(pinned | changed)))


def by_secret() -> EndUsers:
    return EndUsers(
        make_settings(jwt_secret=SecretStr(SHARED_SECRET), jwt_issuer=ISSUER, jwt_audience=AUDIENCE),
    )


async def refusal(users: EndUsers, token: str, now: datetime = NOW) -> Problem:
    with pytest.raises(Problem) as refused:
        await users.identify(token, now)
    return refused.value


def encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def sign_by_hand(header: dict[str, Any], claims: dict[str, Any], key: bytes) -> str:
    """PyJWT itself refuses to sign with a public key."""
    signed = f"{encode(header)}.{encode(claims)}"
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(signed.encode(), key)
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


async def test_a_token_of_the_provider_names_its_customer(provider: Provider) -> None:
    users = by_key_set(provider.url)
    assert (await users.identify(make_token(), NOW)).reference == "acme"
    of_curve = make_token(key=EC_KEY, algorithm="ES256", headers={"kid": "ec-1"})
    assert (await users.identify(of_curve, NOW)).reference == "acme"
    assert provider.asked == 1


async def test_a_token_signed_with_the_shared_secret_names_its_customer() -> None:
    token = make_token(key=SHARED_SECRET, algorithm="HS256", headers={})
    assert (await by_secret().identify(token, NOW)).reference == "acme"


async def test_the_claim_that_names_the_customer_can_be_chosen(provider: Provider) -> None:
    users = by_key_set(provider.url, jwt_customer_claim="https://example.com/company")
    token = make_token(make_claims(sub="user-1") | {"https://example.com/company": "globex"})
    assert (await users.identify(token, NOW)).reference == "globex"
    assert isinstance(await refusal(users, make_token()), Forbidden)


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": None},
        {"aud": "another"},
        {"aud": ["another", "third"]},
        {"iss": None},
        {"iss": "https://login.example.com"},
        {"iss": "https://evil.example/"},
        {"exp": None},
        {"exp": int(time.time()) - 60},
        {"exp": "soon"},
        {"nbf": int(time.time()) + 3600},
        {"iat": int(time.time()) + 3600},
        {"sub": 17},
    ],
    ids=lambda claims: next(iter(claims)),  # without the times, which differ from one test process to the next
)
async def test_a_token_with_a_wrong_claim_is_refused(provider: Provider, claims: dict[str, object]) -> None:
    token = make_token(make_claims(**claims))
    assert isinstance(await refusal(by_key_set(provider.url), token), Unauthorized)
    of_secret = make_token(make_claims(**claims), key=SHARED_SECRET, algorithm="HS256")
    assert isinstance(await refusal(by_secret(), of_secret), Unauthorized)


async def test_clocks_may_differ_a_little(provider: Provider) -> None:
    users, now = by_key_set(provider.url), int(time.time())
    late = make_claims(exp=now - LEEWAY.seconds // 2)
    early = make_claims(nbf=now + LEEWAY.seconds // 2, iat=now + LEEWAY.seconds // 2)
    for claims in (late, early):
        assert (await users.identify(make_token(claims), NOW)).reference == "acme"


async def test_an_expired_token_is_told_from_a_wrong_one(provider: Provider) -> None:
    expired = await refusal(by_key_set(provider.url), make_token(make_claims(exp=1)))
    assert expired.detail == "The token has expired."


@pytest.mark.parametrize(
    "headers",
    [
        {"kid": "rsa-1", "crit": ["exp"], "exp": 1},
        {"kid": "rsa-1", "crit": ["b64"], "b64": True},
        {"kid": "rsa-1", "crit": []},
        {"kid": "unknown"},
        {"kid": "ec-1"},
        {"kid": ""},
        {},
    ],
    ids=str,
)
async def test_a_token_with_a_wrong_header_is_refused(provider: Provider, headers: dict[str, Any]) -> None:
    algorithm = jwt.get_algorithm_by_name("RS256")
    signed = f"{encode({'alg': 'RS256', 'typ': 'JWT'} | headers)}.{encode(make_claims())}"
    signature = base64.urlsafe_b64encode(algorithm.sign(signed.encode(), RSA_KEY)).rstrip(b"=").decode()
    assert isinstance(await refusal(by_key_set(provider.url), f"{signed}.{signature}"), Unauthorized)


@pytest.mark.parametrize("algorithm", ["none", "None", "nOnE", ""])
async def test_a_token_without_a_signature_is_refused(provider: Provider, algorithm: str) -> None:
    for kid in ({"kid": "rsa-1"}, {}):
        token = f"{encode({'alg': algorithm} | kid)}.{encode(make_claims())}."
        assert isinstance(await refusal(by_key_set(provider.url), token), Unauthorized)
        assert isinstance(await refusal(by_secret(), token), Unauthorized)
    assert provider.asked == 0  # nobody is asked for a key that could not be used


async def test_a_public_key_is_no_shared_secret(provider: Provider) -> None:
    token = sign_by_hand({"alg": "HS256", "kid": "rsa-1"}, make_claims(), RSA_PUBLIC_PEM)
    assert isinstance(await refusal(by_key_set(provider.url), token), Unauthorized)


async def test_a_shared_key_in_the_key_set_is_not_used(provider: Provider) -> None:
    shared = {"kty": "oct", "kid": "rsa-1", "k": encode("x" * 40), "alg": "HS256"}
    provider.keys = [shared, public_key(EC_KEY, "ec-1")]
    token = sign_by_hand({"alg": "HS256", "kid": "rsa-1"}, make_claims(), json.dumps("x" * 40).encode())
    assert isinstance(await refusal(by_key_set(provider.url), token), Unauthorized)


@pytest.mark.parametrize("algorithm", ["PS256", "RS512"])
async def test_an_algorithm_that_is_not_pinned_is_refused(provider: Provider, algorithm: str) -> None:
    token = make_token(algorithm=algorithm)
    assert isinstance(await refusal(by_key_set(provider.url), token), Unauthorized)
    assert (await by_key_set(provider.url, jwt_algorithms=(algorithm,)).identify(token, NOW)).reference == "acme"


async def test_a_key_is_used_with_its_own_algorithm_only(provider: Provider) -> None:
    provider.keys = [public_key(RSA_KEY, "rsa-1", alg="RS256")]
    users = by_key_set(provider.url, jwt_algorithms=("RS256", "PS256"))
    assert (await users.identify(make_token(), NOW)).reference == "acme"
    assert isinstance(await refusal(users, make_token(algorithm="PS256")), Unauthorized)


async def test_a_private_key_in_the_key_set_is_not_used(provider: Provider) -> None:
    private = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY)) | {"kid": "rsa-1"}
    provider.keys = [private, public_key(EC_KEY, "ec-1")]
    assert isinstance(await refusal(by_key_set(provider.url), make_token()), Unauthorized)


async def test_a_key_for_encryption_or_a_short_one_is_not_used(provider: Provider) -> None:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505  that is the point
    provider.keys = [public_key(RSA_KEY, "rsa-1", use="enc"), public_key(short, "short"), public_key(EC_KEY, "ec-1")]
    users = by_key_set(provider.url)
    assert isinstance(await refusal(users, make_token()), Unauthorized)
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        token = make_token(key=short, headers={"kid": "short"})
    assert isinstance(await refusal(users, token), Unauthorized)


async def test_a_changed_token_and_another_signers_are_refused(provider: Provider) -> None:
    users = by_key_set(provider.url)
    header, _, signature = make_token().split(".")
    assert isinstance(await refusal(users, f"{header}.{encode(make_claims(sub='globex'))}.{signature}"), Unauthorized)
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert isinstance(await refusal(users, make_token(key=other)), Unauthorized)
    # What a header says about where its key is to be found is not followed.
    own = {"kid": "rsa-1", "jwk": public_key(other, "rsa-1"), "jku": "https://evil.example/keys"}
    assert isinstance(await refusal(users, make_token(key=other, headers=own)), Unauthorized)


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b.c", "eyJ", "é.é.é", encode([]) + ".e30.", "[" * 8000, "x" * 10_000, "\ud800.a.b"]
)
async def test_what_is_no_token_is_refused(provider: Provider, token: str) -> None:
    assert isinstance(await refusal(by_key_set(provider.url), token), Unauthorized)
    assert isinstance(await refusal(by_secret(), token), Unauthorized)
    assert provider.asked == 0


@pytest.mark.parametrize("sub", ["", "cus_other", "a\x00b", "a\nb", "x" * 101])
async def test_a_claim_that_is_no_reference_is_refused(provider: Provider, sub: str) -> None:
    refused = await refusal(by_key_set(provider.url), make_token(make_claims(sub=sub)))
    assert isinstance(refused, Forbidden)


async def test_a_new_key_is_found_and_made_up_ones_do_not_make_us_ask_again_and_again(provider: Provider) -> None:
    users = by_key_set(provider.url)
    await users.identify(make_token(), NOW)
    provider.keys.append(public_key(EC_KEY, "new"))
    token = make_token(key=EC_KEY, algorithm="ES256", headers={"kid": "new"})
    for _ in range(3):
        assert isinstance(await refusal(users, token), Unauthorized)  # it was asked a moment ago
    assert provider.asked == 1
    later = NOW + PAUSE + timedelta(seconds=1)
    assert (await users.identify(token, later)).reference == "acme"
    assert provider.asked == 2


async def test_a_withdrawn_key_is_refused_once_the_set_is_read_again(provider: Provider) -> None:
    users = by_key_set(provider.url)
    await users.identify(make_token(), NOW)
    provider.keys = [public_key(EC_KEY, "ec-1")]
    assert isinstance(await refusal(users, make_token(), NOW + REREAD_EVERY + timedelta(seconds=1)), Unauthorized)


async def test_without_the_provider_known_keys_work_for_a_day_and_unknown_ones_are_a_503(provider: Provider) -> None:
    users = by_key_set(provider.url)
    await users.identify(make_token(), NOW)
    provider.answer = Response(status_code=500)
    later = NOW + REREAD_EVERY + timedelta(seconds=1)
    assert (await users.identify(make_token(), later)).reference == "acme"
    unknown = await refusal(users, make_token(headers={"kid": "new"}), later)
    assert isinstance(unknown, Unavailable)
    assert unknown.retry_after_seconds == PAUSE.seconds
    assert isinstance(await refusal(users, make_token(), NOW + USABLE_FOR + timedelta(seconds=1)), Unavailable)
    provider.answer = None
    assert (await users.identify(make_token(), NOW + 2 * USABLE_FOR)).reference == "acme"


@pytest.mark.parametrize(
    "answer",
    [
        Response(json.dumps({"keys": KEYS, "more": "x" * MAX_KEY_SET_BYTES})),
        Response("[" * 100_000),
        Response("\xff"),
        Response('{"keys": 1}'),
        Response('{"keys": [1, {}, {"kid": "a", "kty": "RSA", "n": "?"}]}'),
        Response("[]"),
        Response('{"keys": []}'),
        RedirectResponse("/moved"),
    ],
    ids=["large", "nested", "not utf-8", "not a list", "rubbish", "a list", "empty", "redirect"],
)
async def test_a_key_set_that_cannot_be_used_is_a_503(provider: Provider, answer: Response) -> None:
    provider.answer = answer
    users = by_key_set(provider.url)
    assert isinstance(await refusal(users, make_token()), Unavailable)
    assert isinstance(await refusal(users, make_token()), Unavailable)
    assert provider.asked == 1


async def test_a_provider_that_is_not_there_is_a_503() -> None:
    assert isinstance(await refusal(by_key_set("http://127.0.0.1:1/keys"), make_token()), Unavailable)
