"""The errors that cross module borders, and how each is shown over HTTP (RFC 9457).

TallystickError
├── SettingsError          the start is refused
├── SchemaError            the migration is refused
└── Problem                an HTTP answer `application/problem+json`
    ├── InvalidRequest     400/422  the body or a parameter is wrong
    ├── Untrusted          400      a webhook that cannot be trusted
    ├── Unauthorized       401      no valid API key or token
    ├── Forbidden          403      the key lacks the scope; the customer is not the user's own
    ├── NotFound           404
    │   ├── UnknownCustomer         no Stripe customer has this name
    │   └── UnknownEvent            no Stripe event with this id came here
    ├── Conflict           409      what is there stands against it
    ├── TooLarge           413
    ├── HeadTooLarge       431
    ├── TooBusy            429      the usage buffer is full
    ├── RateLimited        429      this caller comes too often
    ├── StorageFailed      500      PostgreSQL failed; Stripe is to retry
    ├── StripeRefused      502      Stripe answered with an error
    └── Unavailable        503      a part is down; try again later
"""

from collections.abc import Mapping

from starlette.responses import JSONResponse

PROBLEM_TYPE_BASE = "urn:tallystick:problem:"
PROBLEM_MEDIA_TYPE = "application/problem+json"


class TallystickError(Exception):
    """Base of all errors raised on purpose."""


class SettingsError(TallystickError):
    """A setting is missing or wrong; the text names it."""


class SchemaError(TallystickError):
    """A database that another program uses, or a newer release of this one; nothing of it is changed."""


class Problem(TallystickError):
    """An error with an HTTP answer. `type` is stable and documented; `title` is for people."""

    status = 500
    type = "internal-error"
    title = "Something went wrong on our side"

    def __init__(
        self,
        detail: str | None = None,
        *,
        field: str | None = None,
        retry_after_seconds: int | None = None,
        type: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.type = type or self.type
        self.status = status or self.status

    def body(self) -> dict[str, object]:
        """The members of RFC 9457, and `field` where one is to blame."""
        members: dict[str, object] = {
            "type": PROBLEM_TYPE_BASE + self.type,
            "title": self.title,
            "status": self.status,
        }
        if self.detail is not None:
            members["detail"] = self.detail
        if self.field is not None:
            members["field"] = self.field
        return members

    def headers(self) -> Mapping[str, str]:
        """`Retry-After` (RFC 9110, seconds) where waiting helps, and the challenge that RFC 9110 asks of a 401."""
        headers: dict[str, str] = {}
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(self.retry_after_seconds)
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="tallystick"'
        return headers

    def answer(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, dict(self.headers()), PROBLEM_MEDIA_TYPE)


class InvalidRequest(Problem):
    """The body or a parameter is wrong; sending it again as it is will not help."""

    status = 422
    type = "invalid-request"
    title = "The request is not valid"


class Untrusted(Problem):
    """A webhook whose sender or content cannot be believed."""

    status = 400
    type = "webhook-not-trusted"
    title = "The webhook could not be verified"


class Unauthorized(Problem):
    """No API key or token, or one that is not valid."""

    status = 401
    type = "unauthorized"
    title = "Valid credentials are needed"


class Forbidden(Problem):
    """The API key lacks the scope, or the end user may not do this."""

    status = 403
    type = "forbidden"
    title = "The caller may not do this"


class NotFound(Problem):
    """The path, or the thing it names, is not known."""

    status = 404
    type = "not-found"
    title = "There is nothing here"


class UnknownCustomer(NotFound):
    """No Stripe customer is known by a name."""

    type = "unknown-customer"
    title = "No customer is known by this name"

    def __init__(self, ref: str) -> None:
        super().__init__(f"No Stripe customer is known as {ref!a}.")


class UnknownEvent(NotFound):
    """No Stripe event with an id was received."""

    type = "unknown-event"
    title = "No such event was received"


class Conflict(Problem):
    """The request is well formed, and what is recorded already stands against it."""

    status = 409
    type = "conflict"
    title = "The request does not fit what is recorded"


class TooLarge(Problem):
    """The body exceeds its limit."""

    status = 413
    type = "too-large"
    title = "The request body is too large"


class HeadTooLarge(Problem):
    """What comes before the body, or after it, exceeds its limit."""

    status = 431
    type = "head-too-large"
    title = "The head of the request is too large"


class Unsupported(Problem):
    """The body's format or encoding is not known here; `header` says which ones are (RFC 9110, 15.5.16)."""

    status = 415
    type = "unsupported-media-type"
    title = "The body's format or encoding is not supported"

    def __init__(self, detail: str, *, type: str, header: tuple[str, str]) -> None:
        super().__init__(detail, type=type)
        self.header = header

    def headers(self) -> Mapping[str, str]:
        """Those of every problem, and `Accept` or `Accept-Encoding`."""
        return {**super().headers(), self.header[0]: self.header[1]}


class TooBusy(Problem):
    """Taking more would exceed a limit; waiting helps."""

    status = 429
    type = "too-busy"
    title = "Too much usage is waiting; send it again later"


class RateLimited(Problem):
    """One caller comes more often than it may; waiting helps."""

    status = 429
    type = "rate-limited"
    title = "Too many requests"


class StorageFailed(Problem):
    """PostgreSQL failed while a webhook was being stored."""

    status = 500
    type = "storage-failed"
    title = "The change could not be stored; send it again"


class StripeRefused(Problem):
    """Stripe understood the request and refused it."""

    status = 502
    type = "stripe-refused"
    title = "Stripe refused the request"


class Unavailable(Problem):
    """PostgreSQL, Redis or Stripe is away; waiting helps."""

    status = 503
    type = "unavailable"
    title = "A part of the service is not available; try again later"
