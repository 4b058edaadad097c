"""Every call to `/v1` and `/v2` from the wire and back, top to bottom.

Who calls, whether a fault strikes, whether the answer is known under its Idempotency-Key, which call it is, whether
its parameters are right; then the work, which is done in one piece without waiting, and the answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import Response

from tallystick.dev.fake_stripe import metering
from tallystick.dev.fake_stripe.account import Account, Call
from tallystick.dev.fake_stripe.connections import DroppedConnection
from tallystick.dev.fake_stripe.errors import StripeError, invalid, unknown_url
from tallystick.dev.fake_stripe.faults import Rule, rate_limited, server_error
from tallystick.dev.fake_stripe.objects import (
    catalogue,
    customers,
    event_log,
    invoices,
    meters,
    sessions,
    subscription_items,
    subscriptions,
)
from tallystick.dev.fake_stripe.parameters import check, parse_form, shape_of
from tallystick.dev.fake_stripe.rendering import expand
from tallystick.dev.fake_stripe.resources import Route, supported
from tallystick.dev.fake_stripe.settings import DAY_SECONDS
from tallystick.dev.fake_stripe.state import Object
from tallystick.dev.fake_stripe.versions import API_VERSION, before_basil, in_version

METER_EVENT_STREAM = "/v2/billing/meter_event_stream"
METER_EVENTS = "/v1/billing/meter_events"

REQUESTS_KEPT = 1000
# Stripe keeps an answer for at least 24 hours; here exactly, and not more than so many in all.
ANSWER_SECONDS = DAY_SECONDS
ANSWERS_KEPT = 100_000

ALL_ROUTES = [
    *meters.ROUTES,
    *customers.ROUTES,
    *catalogue.ROUTES,
    *subscriptions.ROUTES,
    *subscription_items.ROUTES,
    *invoices.ROUTES,
    *event_log.ROUTES,
    *sessions.ROUTES,
]


class RateLimit:
    """Calls within the present second of real time."""

    def __init__(self) -> None:
        self._second = 0
        self._calls = 0

    def exceeded(self, limit: int) -> bool:
        """Counts a call; True when it is one too many. A limit of 0 is none."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._calls = second, 0
        self._calls += 1
        return 0 < limit < self._calls


class Api:
    """Answers calls on one account."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._exact: dict[tuple[str, str], Route] = {}
        self._templates: dict[tuple[str, int], list[tuple[list[str], Route]]] = {}
        for route in ALL_ROUTES:
            if "{" in route.path:
                segments = route.path.split("/")
                self._templates.setdefault((route.method, len(segments)), []).append((segments, route))
            else:
                self._exact[route.method, route.path] = route
        self._in_progress: set[str] = set()
        self._busy_meters: set[tuple[str, str | None]] = set()
        self._all_calls = RateLimit()
        self._meter_events = RateLimit()
        self.requests: deque[tuple[Any, ...]] = deque(maxlen=REQUESTS_KEPT)

    async def answer(self, request: Request) -> Response:
        """The ASGI endpoint of `/v1` and `/v2`."""
        account = self._account
        path, method = request.scope["path"], request.method
        body = await request.body() if method == "POST" else request.scope["query_string"]
        key = request.headers.get("idempotency-key") if method == "POST" else None
        request_id = account.ids.new("req")
        account.base_url = f"{request.scope['scheme']}://{request.headers.get('host', 'localhost')}"
        fingerprint = hashlib.sha256(f"{method} {path} ".encode() + body).hexdigest() if key else ""
        known = self._known_answer(key)
        rule = account.faults.draw(method, path, known is not None, account.random) if account.faults.rules else None
        if rule is not None and rule.kind == "drop_before":
            return self._dropped(method, path, body, key)
        replayed = False
        try:
            token = _token(request)
            if known is not None:
                if known["fingerprint"] != fingerprint:
                    raise _idempotency_error(key)
                status, content, replayed = known["status"], known["body"].encode(), True
                await _slow_down(rule)
            elif key is not None and key in self._in_progress:
                raise _key_in_use(key)
            else:
                status, content = await self._execute(request, request_id, key, token, body, fingerprint, rule)
        except StripeError as error:
            status, content = error.status, _encode(error.body)
        self.requests.append((request_id, method, path, body, key, status, account.now()))
        if rule is not None and rule.kind == "timeout_after":
            await asyncio.sleep(float(rule.seconds))
            return DroppedConnection()
        headers = {"Request-Id": request_id, "Stripe-Version": request.headers.get("stripe-version", API_VERSION)}
        if key is not None:
            headers["Idempotency-Key"] = key
        if replayed:
            headers["Idempotent-Replayed"] = "true"
        return Response(content, status, headers, "application/json")

    async def _execute(
        self,
        request: Request,
        request_id: str,
        key: str | None,
        token: str,
        body: bytes,
        fingerprint: str,
        rule: Rule | None,
    ) -> tuple[int, bytes]:
        """Does the work of a call that was not answered before. What it answers is kept under its Idempotency-Key."""
        account, path, method = self._account, request.scope["path"], request.method
        self._check_rate(path)
        if rule is not None and rule.kind == "rate_limit" and not rule.cached:
            raise rate_limited()
        # What is refused before the work begins is not kept: the same key may come again with better parameters.
        route, arguments = self._route(method, path)
        version = request.headers.get("stripe-version", API_VERSION)
        if route.legacy and not before_basil(version):
            raise unknown_url(method, path)
        params = _parameters(route, body)
        expansions = params.pop("expand", None) or []
        call = Call(request_id, method, path, arguments, params, version, token, key, account.base_url)
        if key is not None:
            self._in_progress.add(key)
        try:
            async with self._meter_locked(call):
                await _slow_down(rule)
                status, content = self._work(route, call, expansions, rule)
        finally:
            self._in_progress.discard(key or "")
        if key is not None and (status < 300 or path.startswith("/v1/")):
            self._keep_answer(key, fingerprint, status, content)
        account.note()
        return status, content

    def _work(self, route: Route, call: Call, expansions: list[str], rule: Rule | None) -> tuple[int, bytes]:
        account = self._account
        account.cause = call
        try:
            if rule is not None and rule.kind == "error_500":
                raise server_error()
            if rule is not None and rule.kind == "rate_limit":
                raise rate_limited()
            answer = expand(account, route.handle(account, call), expansions)
            if rule is not None and rule.kind == "error_500_after":
                raise server_error()
        except StripeError as error:
            return error.status, _encode(error.body)
        finally:
            account.cause = None
        return 200, _encode(in_version(account, answer, call.version))

    def _route(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact, {}
        segments = path.split("/")
        for template, route in self._templates.get((method, len(segments)), ()):
            arguments = {}
            for wanted, given in zip(template, segments, strict=True):
                if wanted.startswith("{") and given:
                    arguments[wanted[1:-1]] = given
                elif wanted != given:
                    break
            else:
                return route, arguments
        raise unknown_url(method, path)

    def _check_rate(self, path: str) -> None:
        settings = self._account.settings
        if self._all_calls.exceeded(settings.rate_limit_per_second):
            raise rate_limited()
        if path == METER_EVENTS and self._meter_events.exceeded(settings.meter_event_rate_limit_per_second):
            raise rate_limited()

    @contextlib.asynccontextmanager
    async def _meter_locked(self, call: Call) -> AsyncIterator[None]:
        """A v1 meter event takes its time, and its customer and meter are locked meanwhile."""
        settings = self._account.settings
        if call.path != METER_EVENTS or not settings.one_call_per_customer_and_meter:
            yield
            return
        meter = metering.meter_for(self._account, call.params["event_name"])
        customer_key = meter["customer_mapping"]["event_payload_key"] if meter else ""
        lock = (call.params["event_name"], call.params["payload"].get(customer_key))
        if lock in self._busy_meters:
            message = "Another call for this customer and meter is in progress: try again."
            raise StripeError(429, message, code="lock_timeout")
        self._busy_meters.add(lock)
        try:
            if settings.meter_event_milliseconds:
                await asyncio.sleep(settings.meter_event_milliseconds / 1000)
            yield
        finally:
            self._busy_meters.discard(lock)

    def _known_answer(self, key: str | None) -> Object | None:
        known = self._account.state.get("_answer", key) if key is not None else None
        return known if known is not None and self._account.now() - known["at"] < ANSWER_SECONDS else None

    def _keep_answer(self, key: str, fingerprint: str, status: int, content: bytes) -> None:
        state = self._account.state
        state.put(
            {
                "object": "_answer",
                "id": key,
                "fingerprint": fingerprint,
                "status": status,
                "body": content.decode(),
                "at": self._account.now(),
            }
        )
        if state.count("_answer") > ANSWERS_KEPT:
            state.remove("_answer", state.oldest("_answer")["id"])

    def _dropped(self, method: str, path: str, body: bytes, key: str | None) -> Response:
        self.requests.append(("", method, path, body, key, None, self._account.now()))
        return DroppedConnection()

    def recent(self) -> list[Object]:
        """The last calls, newest first, for `GET /_fake/requests`."""
        return [
            {
                "id": request_id,
                "method": method,
                "path": path,
                "params": _shown_parameters(body),
                "idempotency_key": key,
                "status": status,
                "at": at,
            }
            for request_id, method, path, body, key, status, at in reversed(self.requests)
        ]


async def _slow_down(rule: Rule | None) -> None:
    if rule is not None and rule.kind == "slow":
        await asyncio.sleep(float(rule.seconds))


def _token(request: Request) -> str:
    """The API key, as a bearer token or as the user name of basic authentication. Raises StripeError 401."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            token = base64.b64decode(token).decode().partition(":")[0]
    elif scheme.lower() != "bearer":
        token = ""
    if not token:
        raise StripeError(
            401, "You did not provide an API key. Send it as a bearer token: Authorization: Bearer sk_test_…"
        )
    if not token.startswith(("sk_test_", "rk_test_")) and request.scope["path"] != METER_EVENT_STREAM:
        raise StripeError(401, f"Invalid API Key provided: {token[:8]}***. The fake Stripe takes any key sk_test_….")
    return token


def _parameters(route: Route, body: bytes) -> Object:
    if route.path.startswith("/v2/") and route.method == "POST":
        try:
            raw = json.loads(body or b"{}")
        except ValueError:
            raise invalid("The body is not JSON.") from None
        if not isinstance(raw, dict):
            raise invalid("The body must be a JSON object.")
    else:
        try:
            raw = parse_form(body.decode())
        except UnicodeDecodeError:
            raise invalid("The parameters are not UTF-8.") from None
    params = check(shape_of(route.params), raw)
    for name in params.keys() - supported(route):
        raise invalid(f"The fake Stripe does not support the parameter {name} here.", param=name)
    return params


def _idempotency_error(key: str | None) -> StripeError:
    return StripeError(
        400,
        f"Keys for idempotent requests can only be used with the same parameters they were first used with: {key}.",
        type="idempotency_error",
    )


def _key_in_use(key: str) -> StripeError:
    return StripeError(
        409,
        f"There is currently another in-progress request using this Idempotent Key: {key}.",
        type="idempotency_error",
        code="idempotency_key_in_use",
    )


def _encode(answer: Object) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


def _shown_parameters(body: bytes) -> Any:
    text = body.decode(errors="replace")
    return json.loads(text) if text.startswith("{") else dict(parse_qsl(text, keep_blank_values=True))
