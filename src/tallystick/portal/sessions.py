"""`POST /v1/portal/sessions`: from a customer's name, or an end user's token, to a portal URL.

    1. who      an API key with `portal:create` for any customer, or a token for its own customer only
    2. check    where the browser may be sent afterwards, and that a subscription is the customer's own
    3. slow     one session a second for each customer
    4. ask      Stripe, whose refusal is answered by naming the field

The URL is handed over and neither kept nor logged: whoever has it is signed in as the customer.
"""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import text

from tallystick import db
from tallystick.auth import KEY_PREFIX, authenticate, bearer, bearer_token
from tallystick.card_numbers import refuse_card_number
from tallystick.end_users import EndUser, EndUsers
from tallystick.errors import Forbidden, InvalidRequest, RateLimited, UnknownCustomer
from tallystick.limits import Limiter
from tallystick.portal.flows import FlowData
from tallystick.redis_client import KEY_TAG, REDIS_ERRORS
from tallystick.resources import Resources
from tallystick.rules import PLAIN_TEXT
from tallystick.stripe_gateway import STRIPE_ERRORS, is_missing, refused_parameter, to_problem

router = APIRouter(dependencies=[bearer])

Reference = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=PLAIN_TEXT)]
# Stripe's parameters that are the caller's own choice: one that Stripe does not take is the caller's to mend.
CHOSEN = ("return_url", "configuration", "locale", "flow_data")
# A person who clicks twice means one session; a program that asks more often has lost its way.
PAUSE_MS = 1_000

FIND_CUSTOMER = text("SELECT customer FROM customer_references WHERE ref = :ref")

FIND_SUBSCRIPTION = text("SELECT 1 FROM subscriptions WHERE id = :id AND customer = :customer AND NOT deleted")


class PortalSessionRequest(BaseModel):
    """Whose portal, which page of it, and where to go from there."""

    model_config = ConfigDict(extra="forbid")

    customer: Reference | None = Field(
        default=None,
        description="The product's own reference, or a `cus_…` id. Needed with an API key; a token says it itself.",
        examples=["acme"],
    )
    return_url: str | None = Field(
        default=None,
        max_length=2000,
        description="Where the portal's link back leads; its origin must be in TALLYSTICK_PORTAL_RETURN_ORIGINS.",
    )
    locale: str | None = Field(default=None, min_length=2, max_length=10, description="As in Stripe's `locale`.")
    configuration: str | None = Field(
        default=None, pattern=r"^bpc_[0-9A-Za-z_]{1,80}$", description="A portal configuration. Not for end users."
    )
    flow_data: FlowData | None = Field(default=None, description="Go straight to one page of the portal.")


class PortalSession(BaseModel):
    """The address to send the customer's browser to, soon: Stripe lets it expire within minutes."""

    url: str
    customer: str


async def identify_caller(request: Request) -> EndUser | None:
    """The end user of a token; None for an API key with `portal:create`. Anything else is refused."""
    token, end_users = bearer_token(request), request.app.state.end_users
    assert isinstance(end_users, EndUsers)
    if token is not None and not token.startswith(KEY_PREFIX) and end_users.are_served:
        return await end_users.identify(token, datetime.now(UTC))
    await authenticate(request, "portal:create")
    return None


@router.post(
    "/v1/portal/sessions",
    status_code=201,
    tags=["portal"],
    responses={
        403: {"description": "The key lacks the scope, or the customer is not the end user's own"},
        404: {"description": "No such customer"},
        429: {"description": "A session of this customer was made within the last second"},
        502: {"description": "Stripe refused, as when no portal configuration is saved"},
        503: {"description": "Stripe is not available"},
    },
)
async def create_portal_session(
    request: Request, body: PortalSessionRequest, user: Annotated[EndUser | None, Depends(identify_caller)]
) -> PortalSession:
    """Make a Customer Portal session (https://docs.stripe.com/api/customer_portal/sessions/create).

    Needs the scope `portal:create`, or an end user's token, which opens that user's own portal. 422 names a field:
    a `return_url` that is not allowed, a subscription that is not the customer's, what Stripe does not take.
    """
    resources: Resources = request.app.state.resources
    origins = resources.settings.portal_return_origins
    check_return_url(body.return_url, "return_url", origins)
    if body.flow_data is not None:
        check_return_url(body.flow_data.return_url, "flow_data.after_completion.redirect.return_url", origins)
    customer = await _choose_customer(resources, body, user)
    await _check_subscription(resources, customer, body.flow_data)
    await _slow_down(resources, request.app.state.portal_limiter, customer)
    try:
        session = await resources.stripe.v1.billing_portal.sessions.create_async(_parameters(customer, body))
    except STRIPE_ERRORS as error:
        if is_missing(error, "customer"):
            raise UnknownCustomer(body.customer or customer) from error
        refused = refused_parameter(error) or ""
        if refused.partition("[")[0] in CHOSEN:
            field = refused.replace("[", ".").replace("]", "")
            raise InvalidRequest("Stripe does not take this value.", field=field) from error
        raise to_problem(error) from error
    return PortalSession(url=session.url, customer=customer)


def check_return_url(url: str | None, field: str, origins: tuple[str, ...]) -> None:
    """Refuse an address whose origin is not on the list.

    It must begin with an origin of the list, letter by letter, and then end or go on with a path, query or fragment: so
    no two parsers can differ about the host. Blanks, control characters, backslashes and what is not ASCII have no
    place in a URL and are read differently by different programs.
    """
    if url is None:
        return
    if url.isascii() and url.isprintable() and " " not in url and "\\" not in url:
        for origin in origins:
            if url[: len(origin)].lower() == origin and url[len(origin) : len(origin) + 1] in ("", "/", "?", "#"):
                return
    raise InvalidRequest(
        "Its origin is not in TALLYSTICK_PORTAL_RETURN_ORIGINS.", field=field, type="return-url-not-allowed"
    )


def _parameters(customer: str, body: PortalSessionRequest) -> Any:
    """Stripe's own parameters; what was not given is not sent."""
    return {"customer": customer} | body.model_dump(include=set(CHOSEN), exclude_none=True)


async def _choose_customer(resources: Resources, body: PortalSessionRequest, user: EndUser | None) -> str:
    """The Stripe customer whose portal is made: an end user's own, or the one that the holder of a key names."""
    if user is None:
        if body.customer is None:
            raise InvalidRequest("It is needed with an API key.", field="customer")
        refuse_card_number(body.customer, "customer")
        customer = await _find_customer(resources, body.customer)
        if customer is None and body.customer.startswith("cus_"):
            return body.customer  # not seen yet; Stripe knows whether it exists
        if customer is None:
            raise UnknownCustomer(body.customer)
        return customer
    customer = await _find_customer(resources, user.reference)
    # The same answer whether the other customer exists or not.
    if body.customer is not None and body.customer not in (user.reference, customer):
        raise Forbidden("End users may open their own portal only.", field="customer", type="not-your-customer")
    # The product's decisions: what its portal permits, which price somebody pays, and whom it gives money.
    decided = body.flow_data.for_keys_only() if body.flow_data is not None else None
    if (field := decided or ("configuration" if body.configuration is not None else None)) is not None:
        raise Forbidden("This field is for API keys only.", field=field)
    if customer is None:
        raise UnknownCustomer(user.reference)
    return customer


async def _find_customer(resources: Resources, ref: str) -> str | None:
    async with db.transaction(resources.engine) as connection:
        customer: str | None = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
    return customer


async def _check_subscription(resources: Resources, customer: str, flow: FlowData | None) -> None:
    """Refuse a flow about a subscription that is not the customer's own; as the mirror knows it."""
    if flow is None or flow.subscription is None:
        return
    async with db.transaction(resources.engine) as connection:
        found = await connection.scalar(FIND_SUBSCRIPTION, {"id": flow.subscription, "customer": customer})
    if found is None:
        raise InvalidRequest(
            "The customer has no subscription with this id.",
            field=f"flow_data.{flow.type}.subscription",
            type="unknown-subscription",
        )


async def _slow_down(resources: Resources, limiter: Limiter, customer: str) -> None:
    """Raise `RateLimited` when a session of this customer was asked for within the last second.

    Redis counts for all processes. While it is away each of them counts for itself.
    """
    try:
        first = await resources.redis.set(f"{KEY_TAG}:portal:{customer}", 1, nx=True, px=PAUSE_MS)
    except REDIS_ERRORS:
        first = limiter.admit(customer, 1, datetime.now(UTC))
    if not first:
        raise RateLimited("One portal session a second is made for each customer.", retry_after_seconds=1)
