"""Stripe's SDK: one client, its connections, its errors translated once, and the session of the meter event stream."""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import stripe
from stripe import StripeClient

from tallystick import tracing
from tallystick.config import Settings
from tallystick.errors import Problem, StripeRefused, Unavailable

# The version that stripe 16.1 was generated for; every answer has its shape, whatever the account's default is.
API_VERSION: Final = "2026-10-28.endive"

STRIPE_ERRORS = (stripe.StripeError,)

# Longer than a request under the old token may take, whatever its time-out.
RENEW_BEFORE_THE_END = timedelta(minutes=2)
LONG_AGO = datetime.min.replace(tzinfo=UTC)


@cache
def _trust_stripe() -> ssl.SSLContext:
    """The authorities that come with the SDK. Reading them takes 20 ms, so it is done once."""
    return ssl.create_default_context(cafile=stripe.ca_bundle_path)


class Connections(stripe.HTTPClient):
    """What carries the SDK's calls: aiohttp, with a span around each call.

    A span has the method and the status only, for the path names customers. Why not the SDK's own clients: through
    httpx a call costs six times the processor time, and its one for aiohttp lets errors pass that come within an answer
    (docs/decisions/0014-calls-through-aiohttp.md).
    """

    name = "aiohttp"

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=_trust_stripe()),
            # A call ends within `seconds`, whatever it waits for: leases count on that. Half of it is enough to find
            # that no connection comes about, and then it is certain that nothing was said. Nothing is rounded up.
            timeout=aiohttp.ClientTimeout(total=seconds, connect=seconds / 2, ceil_threshold=seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._proxies: dict[tuple[str, str | None], str | None] = {}

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str] | None, post_data: Any = None, **_: Any
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """Make one call; the answer's body, status and headers. Raises `stripe.APIConnectionError`, with its cause."""
        with tracing.span("Stripe", **{"http.request.method": method.upper()}) as span:
            try:
                async with self._session.request(
                    method, url, headers=headers, data=post_data, allow_redirects=False, proxy=self._proxy_to(url)
                ) as answer:
                    body = await answer.read()
            except (aiohttp.ClientError, OSError) as error:  # a time-out is an OSError
                raise stripe.APIConnectionError(f"No answer of Stripe: {type(error).__name__}.") from error
            span.set_attribute("http.response.status_code", answer.status)
            return body, answer.status, answer.headers

    def _proxy_to(self, url: str) -> str | None:
        """The proxy that the environment names for an address, if any; aiohttp would ask it anew for each call."""
        address = urlsplit(url)
        way = address.scheme, address.hostname
        if way not in self._proxies:
            proxies = {} if proxy_bypass(address.hostname or "") else getproxies()
            self._proxies[way] = proxies.get(address.scheme, proxies.get("all"))
        return self._proxies[way]

    async def close_async(self) -> None:
        """Close the connections."""
        await self._session.close()


def never_reached(error: stripe.APIConnectionError) -> bool:
    """Whether a call failed before a connection was there to make it on: Stripe cannot have heard of it."""
    return isinstance(
        error.__cause__, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.ClientHttpProxyError
    )


def create_stripe(settings: Settings, connections: Connections) -> StripeClient:
    """A client for the account of `STRIPE_API_KEY`. It does not retry: each flow decides what a retry repeats."""
    base = settings.stripe_api_base
    meter_events_base = settings.stripe_meter_events_base or (
        stripe.DEFAULT_METER_EVENTS_API_BASE if base == stripe.DEFAULT_API_BASE else base
    )
    return StripeClient(
        settings.stripe_api_key.get_secret_value(),
        stripe_version=API_VERSION,
        base_addresses={"api": base, "meter_events": meter_events_base},
        max_network_retries=0,
        http_client=connections,
    )


@dataclass
class MeterEventSession:
    """The token of the meter event stream. It lasts 15 minutes, and this process uses it for all requests."""

    client: StripeClient
    token: str = ""
    expires_at: datetime = LONG_AGO
    renewing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def current(self, now: datetime, *, not_this: str | None = None) -> str:
        """A token that is good for some minutes from `now`; another one than `not_this`. Raises Stripe's errors.

        (https://docs.stripe.com/api/v2/billing/meter-event-stream)
        """
        async with self.renewing:
            if self.token in ("", not_this) or self.expires_at <= now + RENEW_BEFORE_THE_END:
                session = await self.client.v2.billing.meter_event_session.create_async()
                self.token = session.authentication_token
                self.expires_at = datetime.fromisoformat(session.expires_at)
            return self.token


def request_id(answered: stripe.StripeError | stripe.StripeObject) -> str | None:
    """Stripe's own name of a request, from its answer: what Stripe's support and logs know it by."""
    if isinstance(answered, stripe.StripeError):
        return answered.request_id
    return answered.last_response.request_id if answered.last_response is not None else None


def error_code(error: stripe.StripeError) -> str | None:
    """Stripe's code for an error. `error.code` is empty for rate limits and idempotency errors; the body is not."""
    body: Any = getattr(error, "error", None)
    return error.code or getattr(body, "code", None) or getattr(body, "type", None)


def is_missing(error: stripe.StripeError, parameter: str) -> bool:
    """Whether Stripe does not know the object that a parameter named."""
    named: Any = getattr(error, "param", None)
    return error_code(error) == "resource_missing" and named == parameter


def refused_parameter(error: stripe.StripeError) -> str | None:
    """The parameter that Stripe refused to take, as it names it; None when something else was wrong."""
    return error.param if isinstance(error, stripe.InvalidRequestError) else None


def to_problem(error: stripe.StripeError) -> Problem:
    """What to answer when a request needed Stripe: 503 where waiting may help, else 502 with Stripe's code."""
    status = error.http_status
    if isinstance(error, stripe.APIConnectionError) or status is None or status == 429 or status >= 500:
        return Unavailable(
            "Stripe did not answer as it should; try again.", type="stripe-unavailable", retry_after_seconds=5
        )
    return StripeRefused(f"Stripe answered {status} {error_code(error) or 'without a code'}.")
