"""What every answer tells a browser, and which pages may call which route."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tallystick.app import create_app
from tallystick.config import Settings
from tallystick.resources import Resources
from tests.conftest import open_client
from tests.usage.making import make_customer

ORIGIN = "https://app.example.com"
PORTAL = "/v1/portal/sessions"
ASKED = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture
async def frontend(settings: Settings, resources: Resources) -> AsyncIterator[httpx.AsyncClient]:
    served = settings.model_copy(update={"cors_origins": (ORIGIN, "http://localhost:3000")})
    application = create_app(served)
    async with application.router.lifespan_context(application), open_client(application, None) as opened:
        yield opened


def cors_headers(answer: httpx.Response) -> set[str]:
    return {name for name in answer.headers if name.startswith("access-control-")}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/nothing", 404),
        ("PUT", "/v1/usage", 405),
        ("POST", "/v1/usage", 401),
        ("POST", "/webhooks/stripe", 400),
        ("GET", "/v1/customers/acme/access", 401),
    ],
)
async def test_every_answer_has_the_security_headers(
    anonymous: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await anonymous.request(method, path)
    assert answer.status_code == status
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
    assert answer.headers.get_list("cache-control") == ["no-store"]
    (policy,) = answer.headers.get_list("content-security-policy")
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    assert not cors_headers(answer)


async def test_an_unforeseen_error_has_them_too_and_tells_nothing(
    anonymous: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("tallystick.webhooks.inbox.read_event", break_down)
    answer = await anonymous.post("/webhooks/stripe", content=b"{}")
    assert answer.status_code == 500
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret detail" not in answer.text


async def test_what_an_answer_says_itself_about_caching_stays(client: httpx.AsyncClient, resources: Resources) -> None:
    await make_customer(resources)
    await client.put("/v1/customers/linked", json={"customer": "cus_acme"})
    answer = await client.get("/v1/customers/linked/access")
    assert answer.headers.get_list("cache-control") == ["private, no-cache"]


async def test_a_listed_origin_may_ask_and_post(frontend: httpx.AsyncClient) -> None:
    asked = await frontend.options(PORTAL, headers={"Origin": ORIGIN} | ASKED)
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert asked.headers["access-control-allow-methods"] == "POST"
    assert asked.headers["access-control-allow-headers"] == "Authorization, Content-Type"
    posted = await frontend.post(PORTAL, json={}, headers={"Origin": ORIGIN})
    assert (posted.status_code, posted.headers["access-control-allow-origin"]) == (401, ORIGIN)
    for answer in (asked, posted):
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
        assert "*" not in str(dict(answer.headers))


OTHERS = [
    "https://evil.example",
    "http://app.example.com",
    "https://app.example.com:8443",
    "https://app.example.com.evil.example",
    "https://evil-app.example.com",
    "https://sub.app.example.com",
    "HTTPS://APP.EXAMPLE.COM",
    "https://app.example.com/",
    "https://app.example.com ,https://evil.example",
    "null",
    "*",
    "",
]


async def test_any_other_origin_may_not(frontend: httpx.AsyncClient) -> None:
    for origin in OTHERS:
        for answer in (
            await frontend.options(PORTAL, headers={"Origin": origin} | ASKED),
            await frontend.post(PORTAL, json={}, headers={"Origin": origin}),
        ):
            assert not cors_headers(answer), origin
            assert answer.headers["vary"] == "Origin"


async def test_no_other_route_is_open_to_pages(frontend: httpx.AsyncClient) -> None:
    for path in ("/v1/usage", "/v1/customers/acme", "/v1/access", "/webhooks/stripe", "/metrics", f"{PORTAL}/"):
        assert not cors_headers(await frontend.options(path, headers={"Origin": ORIGIN} | ASKED))
        assert not cors_headers(await frontend.get(path, headers={"Origin": ORIGIN}))


async def test_without_the_setting_no_page_may_call_anything(anonymous: httpx.AsyncClient) -> None:
    answer = await anonymous.options(PORTAL, headers={"Origin": ORIGIN} | ASKED)
    assert answer.status_code == 405
    assert not cors_headers(answer)
