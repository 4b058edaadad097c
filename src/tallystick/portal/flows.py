"""The portal's flows: Stripe's `flow_data`, in Stripe's own words, checked before Stripe is asked.

https://docs.stripe.com/customer-management/portal-deep-links; a test compares the fields with those of Stripe's SDK.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FlowType = Literal[
    "payment_method_update",
    "subscription_cancel",
    "subscription_update",
    "subscription_update_confirm",
    "customer_update",
    "subscription_pause",
]

# What the portal's page can show; nobody reads more at the end of a flow.
MAX_MESSAGE = 500
MAX_URL = 2_000

# Letters are spelled out: \w means those of all scripts, and a hundred of them take the library 20 ms to compile.
SubscriptionId = Annotated[
    str, Field(pattern=r"^sub_[0-9A-Za-z_]{1,100}$", description="A subscription of the customer.")
]
ObjectId = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,200}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Redirect(_Part):
    """Send the customer back to the product."""

    return_url: Annotated[
        str, Field(max_length=MAX_URL, description="Its origin must be in TALLYSTICK_PORTAL_RETURN_ORIGINS.")
    ]


class HostedConfirmation(_Part):
    """Show Stripe's page that says it is done."""

    custom_message: Annotated[str, Field(min_length=1, max_length=MAX_MESSAGE)] | None = None


class AfterCompletion(_Part):
    """What follows when the customer has gone through the flow. Default: the portal's own pages."""

    type: Literal["hosted_confirmation", "portal_homepage", "redirect"]
    redirect: Redirect | None = None
    hosted_confirmation: HostedConfirmation | None = None

    @model_validator(mode="after")
    def _parts_fit_the_type(self) -> Self:
        if self.redirect is None and self.type == "redirect":
            raise ValueError("The type redirect needs redirect.")
        if self.redirect is not None and self.type != "redirect":
            raise ValueError("redirect is given with the type redirect only.")
        if self.hosted_confirmation is not None and self.type != "hosted_confirmation":
            raise ValueError("hosted_confirmation is given with the type hosted_confirmation only")
        return self


class CouponOffer(_Part):
    """A coupon for a customer who would stay for it."""

    coupon: ObjectId


class Retention(_Part):
    """What is offered to a customer who wants to leave."""

    type: Literal["coupon_offer"]
    coupon_offer: CouponOffer


class SubscriptionCancel(_Part):
    """Which subscription is to end."""

    subscription: SubscriptionId
    retention: Retention | None = Field(default=None, description="Not for end users: it gives money away.")


class SubscriptionPause(_Part):
    """Which subscription is to rest."""

    subscription: SubscriptionId


class SubscriptionUpdate(_Part):
    """Which subscription is to change."""

    subscription: SubscriptionId


class Item(_Part):
    """What an item of the subscription is to become."""

    id: Annotated[str, Field(pattern=r"^si_[0-9A-Za-z_]{1,100}$")]
    price: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,200}$")] | None = None
    quantity: Annotated[int, Field(ge=0, le=999_999_999)] | None = None


class Discount(_Part):
    """A coupon or a promotion code, one of them."""

    coupon: ObjectId | None = None
    promotion_code: ObjectId | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.coupon is None) is (self.promotion_code is None):
            raise ValueError("give a coupon or a promotion_code")
        return self


class SubscriptionUpdateConfirm(_Part):
    """Which change the customer is asked to confirm."""

    subscription: SubscriptionId
    # Stripe takes one item, of a subscription that has one.
    items: Annotated[
        list[Item], Field(min_length=1, max_length=1, description="Not for end users: any price may be asked for.")
    ]
    discounts: Annotated[list[Discount], Field(max_length=20)] | None = None


class FlowData(_Part):
    """A page of the portal to go straight to. A `subscription_…` type needs the part of its name, and no other."""

    type: FlowType
    after_completion: AfterCompletion | None = None
    subscription_cancel: SubscriptionCancel | None = None
    subscription_pause: SubscriptionPause | None = None
    subscription_update: SubscriptionUpdate | None = None
    subscription_update_confirm: SubscriptionUpdateConfirm | None = None

    @model_validator(mode="after")
    def _parts_fit_the_type(self) -> Self:
        parts = ("subscription_cancel", "subscription_pause", "subscription_update", "subscription_update_confirm")
        for name in parts:
            if getattr(self, name) is None and self.type == name:
                raise ValueError(f"The type {name} needs {name}.")
            if getattr(self, name) is not None and self.type != name:
                raise ValueError(f"{name} is given with the type {name} only.")
        return self

    @property
    def subscription(self) -> str | None:
        """The subscription that the flow is about."""
        part = (
            self.subscription_cancel
            or self.subscription_pause
            or self.subscription_update
            or self.subscription_update_confirm
        )
        return part.subscription if part is not None else None

    @property
    def return_url(self) -> str | None:
        """Where the flow leads to in the end, if it leaves the portal."""
        done = self.after_completion
        return done.redirect.return_url if done is not None and done.redirect is not None else None

    def for_keys_only(self) -> str | None:
        """The field that decides what the customer pays, if there is one: for the product, and not for its users.

        Of `items` Stripe does not say that the portal's configuration bounds which price may be confirmed.
        """
        if self.subscription_cancel is not None and self.subscription_cancel.retention is not None:
            return "flow_data.subscription_cancel.retention"
        if self.subscription_update_confirm is not None:
            return "flow_data.subscription_update_confirm.items"
        return None
