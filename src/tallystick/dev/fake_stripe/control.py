"""The control API below `/_fake/`: the clock, faults, webhooks, and a look inside. JSON in, JSON out."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.dev.fake_stripe.account import Account
from tallystick.dev.fake_stripe.api import Api
from tallystick.dev.fake_stripe.errors import StripeError, invalid
from tallystick.dev.fake_stripe.objects.event_log import make_endpoint
from tallystick.dev.fake_stripe.objects.sessions import complete_checkout
from tallystick.dev.fake_stripe.rendering import render
from tallystick.dev.fake_stripe.transitions import ClockWork, plan_all

Handler = Callable[[Request, dict[str, Any]], Awaitable[Any]]

FARTHEST_SECONDS = 10 * 366 * 86_400
"""One move of the clock goes ten years at most: a slip of the keyboard must not bill for centuries."""


class Control:
    """The control API on one account."""

    def __init__(self, account: Account, api: Api, clockwork: ClockWork) -> None:
        self._account = account
        self._api = api
        self._clockwork = clockwork

    def routes(self) -> list[Route]:
        """What there is. docs/fake-stripe.md has an example of each."""
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/_fake/clock", self.get_clock),
            ("POST", "/_fake/clock", self.move_clock),
            ("POST", "/_fake/settle", self.settle),
            ("POST", "/_fake/webhook_endpoints", self.set_endpoint),
            ("POST", "/_fake/faults", self.add_fault),
            ("GET", "/_fake/faults", self.get_faults),
            ("DELETE", "/_fake/faults", self.clear_faults),
            ("POST", "/_fake/webhooks", self.set_webhooks),
            ("GET", "/_fake/settings", self.get_settings),
            ("POST", "/_fake/settings", self.set_settings),
            ("GET", "/_fake/requests", self.get_requests),
            ("GET", "/_fake/meter_events", self.get_meter_events),
            ("GET", "/_fake/deliveries", self.get_deliveries),
            ("POST", "/_fake/checkout_sessions/{id}/complete", self.complete),
            ("POST", "/_fake/reset", self.reset),
        ]
        return [Route(path, _as_json(control), methods=[method]) for method, path, control in table]

    async def get_clock(self, _: Request, body: dict[str, Any]) -> Any:
        """The account's time."""
        del body
        return {"now": self._account.now(), "frozen": self._account.clock.frozen_at is not None}

    async def move_clock(self, _: Request, body: dict[str, Any]) -> Any:
        """Freezes or runs the clock, and moves it; answers with all that fell due on the way."""
        _only(body, "advance_seconds", "to", "frozen", "settle_seconds")
        performed: list[Any] = []
        if "frozen" in body:
            self._account.clock.freeze(_flag(body, "frozen"))
        if "to" in body or "advance_seconds" in body:
            now = self._account.now()
            target = _whole(body, "to") if "to" in body else now + _whole(body, "advance_seconds")
            if target < now and self._account.state.count("event"):
                raise invalid("The clock goes back only on an account without events.", param="to")
            if target > now + FARTHEST_SECONDS:
                raise invalid("The clock moves ten years at a time at most.", param="to")
            if target < now:
                self._account.clock.move_to(target)
            else:
                performed = await self._clockwork.move(target, float(_number(body, "settle_seconds", Decimal(10))))
        self._account.agenda.changed.set()
        self._account.note()
        return {"now": self._account.now(), "frozen": self._account.clock.frozen_at is not None, "performed": performed}

    async def settle(self, _: Request, body: dict[str, Any]) -> Any:
        """Answers once no webhook is pending, or 504 with what still is."""
        _only(body, "timeout_seconds")
        if await self._account.deliveries.settled(float(_number(body, "timeout_seconds", Decimal(10)))):
            return {"pending": []}
        return JSONResponse({"pending": self._account.deliveries.pending()}, 504)

    async def set_endpoint(self, _: Request, body: dict[str, Any]) -> Any:
        """Makes an endpoint with a given secret, or replaces the one of the same url."""
        _only(body, "url", "secret", "old_secret", "enabled_events", "api_version")
        url, secret = body.get("url"), body.get("secret")
        if not isinstance(url, str) or urlsplit(url).scheme not in ("http", "https"):
            raise invalid("url is an http or https address.", param="url")
        if not isinstance(secret, str) or not secret:
            raise invalid("secret is the signing secret, whsec_….", param="secret")
        secrets = [secret, *([body["old_secret"]] if body.get("old_secret") else [])]
        events = body.get("enabled_events", ["*"])
        version = body.get("api_version")
        for endpoint in self._account.state.all("webhook_endpoint"):
            if endpoint["url"] == url:
                endpoint |= {"_secrets": secrets, "enabled_events": events, "api_version": version, "status": "enabled"}
                return render(self._account, self._account.state.put(endpoint))
        return render(self._account, make_endpoint(self._account, url, secrets, events, version))

    async def add_fault(self, _: Request, body: dict[str, Any]) -> Any:
        """Adds a rule."""
        return self._account.faults.add(body).show()

    async def get_faults(self, _: Request, body: dict[str, Any]) -> Any:
        """The rules, and how often each struck."""
        del body
        return {"faults": [rule.show() for rule in self._account.faults.rules]}

    async def clear_faults(self, _: Request, body: dict[str, Any]) -> Any:
        """Takes all rules away."""
        del body
        self._account.faults.clear()
        return {"faults": []}

    async def set_webhooks(self, _: Request, body: dict[str, Any]) -> Any:
        """Sets how webhooks misbehave."""
        options = self._account.deliveries.options
        _only(body, *vars(options))
        for name in ("shuffle", "paused"):
            if name in body:
                setattr(options, name, _flag(body, name))
        for name in ("duplicate_probability", "delay_seconds"):
            setattr(options, name, _number(body, name, getattr(options, name)))
        if "max_attempts" in body:
            options.max_attempts = None if body["max_attempts"] is None else _whole(body, "max_attempts")
        self._account.deliveries.resume()
        return {name: str(value) if isinstance(value, Decimal) else value for name, value in vars(options).items()}

    async def get_settings(self, _: Request, body: dict[str, Any]) -> Any:
        """The settings."""
        del body
        return asdict(self._account.settings)

    async def set_settings(self, _: Request, body: dict[str, Any]) -> Any:
        """Changes settings."""
        self._account.settings.change(body)
        plan_all(self._account)
        self._account.note()
        return asdict(self._account.settings)

    async def get_requests(self, _: Request, body: dict[str, Any]) -> Any:
        """The last calls, newest first."""
        del body
        return {"requests": self._api.recent()}

    async def get_meter_events(self, _: Request, body: dict[str, Any]) -> Any:
        """All meter events that were accepted, oldest first."""
        del body
        return {"meter_events": [_without_object(event) for event in self._account.state.all("_meter_event")]}

    async def get_deliveries(self, _: Request, body: dict[str, Any]) -> Any:
        """What is pending, and the last attempts, oldest first."""
        del body
        return {
            "pending": [_without_object(delivery) for delivery in self._account.deliveries.pending()],
            "attempts": list(self._account.deliveries.attempts),
        }

    async def complete(self, request: Request, body: dict[str, Any]) -> Any:
        """Completes a checkout session, as its page does."""
        _only(body)
        session = self._account.state.get("checkout.session", request.path_params["id"])
        if session is None:
            raise StripeError(404, "There is no such checkout session.")
        complete_checkout(self._account, session)
        self._account.note()
        return render(self._account, session)

    async def reset(self, _: Request, body: dict[str, Any]) -> Any:
        """Empties the account; optionally with another seed and time."""
        _only(body, "seed", "to", "frozen")
        seed = _whole(body, "seed") if "seed" in body else None
        moment = _whole(body, "to") if "to" in body else None
        frozen = _flag(body, "frozen") if "frozen" in body else False
        self._account.start_anew(seed)
        self._api.requests.clear()
        if moment is not None:
            self._account.clock.move_to(moment)
        self._account.clock.freeze(frozen)
        self._account.note()
        return {"now": self._account.now(), "frozen": frozen, "seed": self._account.seed}


def _as_json(control: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            text = await request.body()
            # Numbers with a point stay decimals: probabilities and waiting times.
            body = json.loads(text, parse_float=Decimal) if text else {}
            if not isinstance(body, dict):
                raise invalid("The body must be a JSON object.")
            answer = await control(request, body)
        except ValueError:
            return JSONResponse(invalid("The body is not JSON.").body, 400)
        except StripeError as error:
            return JSONResponse(error.body, error.status)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return endpoint


def _only(body: dict[str, Any], *names: str) -> None:
    unknown = sorted(body.keys() - set(names))
    if unknown:
        raise invalid(f"Unknown: {', '.join(unknown)}. Known: {', '.join(names) or 'nothing'}.", param=unknown[0])


def _whole(body: dict[str, Any], name: str) -> int:
    value = body[name]
    if type(value) is not int:
        raise invalid(f"{name} is a whole number.", param=name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body[name]
    if type(value) is not bool:
        raise invalid(f"{name} is true or false.", param=name)
    return value


def _number(body: dict[str, Any], name: str, default: Decimal) -> Decimal:
    value = body.get(name, default)
    try:
        number = Decimal(str(value))
    except ArithmeticError:
        raise invalid(f"{name} is a number.", param=name) from None
    if not number.is_finite() or number < 0:
        raise invalid(f"{name} is a number, not below 0.", param=name)
    return number


def _without_object(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "object"}
