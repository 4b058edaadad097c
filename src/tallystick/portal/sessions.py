"""`POST /v1/portal/sessions`: from a customer's name to a portal URL.

The URL is handed over and neither kept nor logged:
whoever has it is signed in as the customer.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import text

from tallystick import db
from tallystick.auth import bearer, require_scope
from tallystick.errors import InvalidRequest, UnknownCustomer
from tallystick.resources import Resources
from tallystick.stripe_gateway import STRIPE_ERRORS, is_missing, refused_parameter, to_problem

router = APIRouter(dependencies=[bearer])

Reference = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
# Stripe's parameters that are the caller's own choice → the fields in which the caller made it.
FIELDS = {"return_url": "return_url", "configuration": "configuration", "locale": "locale", "flow_data[type]": "flow"}

Flow = Literal["payment_method_update"]


class PortalSessionRequest(BaseModel):
    """Whose portal, and where to go from there."""

    model_config = ConfigDict(extra="forbid")

    customer: Reference = Field(description="The product's own reference, or a `cus_…` id.", examples=["acme"])
    return_url: str | None = Field(
        default=None,
        max_length=2000,
        description="Where the portal's link back leads; its origin must be in TALLYSTICK_PORTAL_RETURN_ORIGINS.",
    )
    locale: str | None = Field(default=None, min_length=2, max_length=10, description="As in Stripe's `locale`.")
    configuration: str | None = Field(default=None, pattern=r"^bpc_\w{1,80}$", description="A portal configuration.")
    flow: Flow | None = Field(default=None, description="Go straight to this page of the portal.")


class PortalSession(BaseModel):
    """The address to send the customer's browser to, soon: Stripe lets it expire within minutes."""

    url: str
    customer: str


@router.post(
    "/v1/portal/sessions",
    status_code=201,
    dependencies=[Depends(require_scope("portal:create"))],
    tags=["portal"],
    responses={404: {"description": "No such customer"}, 503: {"description": "Stripe is not available"}},
)
async def create_portal_session(request: Request, response: Response, body: PortalSessionRequest) -> PortalSession:
    """Make a Customer Portal session (https://docs.stripe.com/api/customer_portal/sessions/create).

    Needs the scope `portal:create`. 404 unknown customer, 422 a `return_url` that is not allowed, 502 Stripe refused
    (as when no portal configuration is saved), 503 Stripe is not available.
    """
    resources: Resources = request.app.state.resources
    if body.return_url is not None:
        _check_return_url(body.return_url, resources.settings.portal_return_origins)
    customer = await _find_customer(resources, body.customer)
    try:
        session = await resources.stripe.v1.billing_portal.sessions.create_async(_parameters(customer, body))
    except STRIPE_ERRORS as error:
        if is_missing(error, "customer"):
            raise UnknownCustomer(body.customer) from error
        if (refused := refused_parameter(error)) in FIELDS:
            raise InvalidRequest("Stripe does not take this value.", field=FIELDS[refused]) from error
        raise to_problem(error) from error
    response.headers["Cache-Control"] = "no-store"
    return PortalSession(url=session.url, customer=customer)


def _parameters(customer: str, body: PortalSessionRequest) -> Any:
    """Stripe's own parameters; what was not given is not sent."""
    given = body.model_dump(include={"return_url", "configuration", "locale"}, exclude_none=True)
    flow = {"flow_data": {"type": body.flow}} if body.flow else {}
    return {"customer": customer} | given | flow


def _check_return_url(url: str, origins: tuple[str, ...]) -> None:
    """Compare scheme, host and port with the allow-list, exactly; refuse what a browser may read otherwise."""
    suspicious = "\\" in url or "@" in url or any(ord(c) <= 32 or ord(c) == 127 for c in url)
    parts = urlsplit(url) if not suspicious else urlsplit("")
    if parts.scheme and parts.netloc and f"{parts.scheme}://{parts.netloc}".lower() in origins:
        return
    raise InvalidRequest(
        "Its origin is not in TALLYSTICK_PORTAL_RETURN_ORIGINS.", field="return_url", type="return-url-not-allowed"
    )


async def _find_customer(resources: Resources, ref: str) -> str:
    async with db.transaction(resources.engine) as connection:
        customer: str | None = await connection.scalar(
            text("SELECT customer FROM customer_references WHERE ref = :ref"), {"ref": ref}
        )
    if customer is None and ref.startswith("cus_"):
        return ref  # not seen yet; Stripe knows whether it exists
    if customer is None:
        raise UnknownCustomer(ref)
    return customer
