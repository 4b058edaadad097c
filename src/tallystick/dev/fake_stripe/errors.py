"""The errors that the fake Stripe answers with, in Stripe's own shape."""

from __future__ import annotations

from typing import Any


class StripeError(Exception):
    """An answer other than 2xx: `{"error": {"type", "code", "message", "param"}}` with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        error = {"type": type, "code": code, "message": message, "param": param, **details}
        self.body = {"error": {name: value for name, value in error.items() if value is not None}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> StripeError:
    """A 400 for a request that Stripe would refuse."""
    return StripeError(400, message, param=param, code=code)


def missing(what: str, identifier: str, param: str, status: int = 400) -> StripeError:
    """`resource_missing`: 404 when the id stands in the path, 400 when a parameter names it."""
    return StripeError(status, f"No such {what}: '{identifier}'", code="resource_missing", param=param)


def unknown_url(method: str, path: str) -> StripeError:
    """The 404 for a route that does not exist, whatever the method."""
    return StripeError(404, f"Unrecognized request URL ({method}: {path}). Is the path right, and the method?")
