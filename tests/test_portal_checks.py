"""The portal's flows and return addresses, as far as they are checked without asking anybody."""

import inspect
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel, ValidationError
from stripe.params.billing_portal import _session_create_params as sdk_parts

from tallystick.errors import InvalidRequest
from tallystick.portal import flows
from tallystick.portal.sessions import PortalSessionRequest, check_return_url

ORIGINS = ("https://app.example.com",)
LEADS_ELSEWHERE = [
    "",
    "/billing",
    "//app.example.com/",
    "///app.example.com/",
    "\\\\app.example.com/",
    "https:app.example.com/",
    "https:/app.example.com/",
    "https:///app.example.com/",
    "https:\\\\app.example.com/",
    "https://evil.example/",
    "https://evil.example/https://app.example.com/",
    "https://evil.example/?https://app.example.com/",
    "https://evil.example#https://app.example.com/",
    "http://app.example.com/",
    "https://example.com/",
    "https://app.example.com:443/",
    "https://app.example.com:8443/",
    "https://app.example.com:/",
    "https://app.example.com:@evil.example/",
    "https://app.example.com@evil.example/",
    "https://app.example.com%40evil.example/",
    "https://app.example.com%2f@evil.example/",
    "https://user@app.example.com/",
    "https://user:password@app.example.com/",
    "https://evil.example\\@app.example.com/",
    "https://app.example.com\\@evil.example/",
    "https://app.example.com\\.evil.example/",
    "https://app.example.com.evil.example/",
    "https://app.example.com.",
    "https://app.example.com./",
    "https://app.example.com%2eevil.example/",
    "https://app.example.com;evil.example/",
    "https://app.example.community/",
    "https://evil-app.example.com/",
    "https://sub.app.example.com/",
    "https://app.example.com\t/",
    "https://app.example.com\t.evil.example/",
    "https://app.example.com\n.evil.example/",
    "https://app.example.com\r\n.evil.example/",
    "https://app.example.com/\r\nLocation: https://evil.example/",
    "ht\ntps://evil.example/",
    " https://app.example.com/",
    "https://app.example.com /",
    "https://app.example.com\x00.evil.example/",
    "https://app.example.com\u2044.evil.example/",
    "https://app.example.com\uff0fevil.example/",
    "https://app.example.com\uff0eevil.example/",
    "https://app.ex\u0430mple.com/",
    "https://app\u3002example\u3002com/",
    "https://\uff41pp.example.com/",
    "https://[app.example.com/",
    "https://[::1]/",
    "https://app.example.com]/",
    "javascript:alert(1)//https://app.example.com",
    "javascript://app.example.com/%0aalert(1)",
    "JaVaScRiPt:alert(1)",
    "data:text/html,https://app.example.com/",
    "blob:https://app.example.com/",
    "file://app.example.com/",
    "ftp://app.example.com/",
    "https%3a//app.example.com/",
    "https://app.example.com/\\evil.example/",
    "https://app.example.com/a b",
    "https://app.example.com/\u0430",
    "null",
    "*",
]


WITHIN = [
    "https://app.example.com",
    "https://app.example.com/",
    "HTTPS://App.Example.COM/Billing",
    "https://app.example.com?from=portal",
    "https://app.example.com#billing",
    "https://app.example.com/@someone?next=https://elsewhere.example/#x",
]


@pytest.mark.parametrize("url", WITHIN)
def test_any_place_within_an_allowed_origin_is_taken(url: str) -> None:
    check_return_url(url, "return_url", ORIGINS)


@pytest.mark.parametrize("url", LEADS_ELSEWHERE)
def test_an_address_that_leads_elsewhere_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_return_url(url, "return_url", ORIGINS)
    assert (refused.value.status, refused.value.type) == (422, "return-url-not-allowed")


SUBSCRIPTION = "sub_acme"
ITEM = "si_acme"
FLOWS: list[dict[str, Any]] = [
    {"type": "payment_method_update"},
    {"type": "customer_update"},
    {"type": "subscription_cancel", "subscription_cancel": {"subscription": SUBSCRIPTION}},
    {
        "type": "subscription_cancel",
        "subscription_cancel": {
            "subscription": SUBSCRIPTION,
            "retention": {"type": "coupon_offer", "coupon_offer": {"coupon": "STAY"}},
        },
    },
    {"type": "subscription_pause", "subscription_pause": {"subscription": SUBSCRIPTION}},
    {"type": "subscription_update", "subscription_update": {"subscription": SUBSCRIPTION}},
    {
        "type": "subscription_update_confirm",
        "subscription_update_confirm": {
            "subscription": SUBSCRIPTION,
            "items": [{"id": ITEM, "price": "price_1", "quantity": 2}],
            "discounts": [{"promotion_code": "promo_1"}],
        },
    },
]


@pytest.mark.parametrize(
    "flow",
    [
        {"type": "subscription_cancel"},
        {"type": "subscription_pause"},
        {"type": "subscription_update"},
        {"type": "subscription_update_confirm"},
        {"type": "subscription_cancel", "subscription_update": {"subscription": SUBSCRIPTION}},
        {"type": "customer_update", "subscription_update": {"subscription": SUBSCRIPTION}},
        {"type": "subscription_cancel", "subscription_cancel": {"subscription": "in_1"}},
        {"type": "subscription_cancel", "subscription_cancel": {"subscription": SUBSCRIPTION, "retention": {}}},
        {"type": "subscription_update_confirm", "subscription_update_confirm": {"subscription": SUBSCRIPTION}},
        {
            "type": "subscription_update_confirm",
            "subscription_update_confirm": {"subscription": SUBSCRIPTION, "items": []},
        },
        {
            "type": "subscription_update_confirm",
            "subscription_update_confirm": {
                "subscription": SUBSCRIPTION,
                "items": [{"id": ITEM}],
                "discounts": [{"coupon": "a", "promotion_code": "b"}],
            },
        },
        {"type": "customer_update", "after_completion": {"type": "redirect"}},
        {"type": "customer_update", "after_completion": {"type": "portal_homepage", "redirect": {"return_url": "x"}}},
        {
            "type": "customer_update",
            "after_completion": {"type": "portal_homepage", "hosted_confirmation": {"custom_message": "x"}},
        },
        {"type": "customer_update", "surprise": 1},
    ],
    ids=str,
)
def test_a_flow_that_lacks_something_or_has_too_much_is_refused(flow: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        PortalSessionRequest.model_validate({"customer": "acme", "flow_data": flow})
    assert {problem["loc"][0] for problem in refused.value.errors()} == {"flow_data"}


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.annotation for name, field in model.model_fields.items()}


def parts_of(annotation: Any) -> set[Any]:
    """The classes and literals within an annotation, without None and the containers."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType, list) or hasattr(annotation, "__metadata__"):
        return {part for argument in get_args(annotation) for part in parts_of(argument)}
    return {annotation} - {type(None)}


def compare(model: type[BaseModel], params: Any) -> None:
    """Our model has the fields of the SDK's TypedDict, needs those that it needs, and knows the same values."""
    known = get_type_hints(params, vars(sdk_parts))
    ours = fields_of(model)
    assert ours.keys() == known.keys(), model
    for name, annotation in ours.items():
        assert model.model_fields[name].is_required() is (name in params.__required_keys__), (model, name)
        our_parts, their_parts = parts_of(annotation), parts_of(known[name])
        assert {part for part in our_parts if isinstance(part, str)} == {
            part for part in their_parts if isinstance(part, str)
        }, (model, name)
        inner = [part for part in our_parts if inspect.isclass(part) and issubclass(part, BaseModel)]
        their_inner = [part for part in their_parts if hasattr(part, "__required_keys__")]
        assert len(inner) == len(their_inner) <= 1, (model, name)
        for part, their_part in zip(inner, their_inner, strict=True):
            compare(part, their_part)


def test_the_flows_are_those_of_stripe_s_sdk() -> None:
    compare(flows.FlowData, sdk_parts.SessionCreateParamsFlowData)
    assert fields_of(PortalSessionRequest).keys() <= sdk_parts.SessionCreateParams.__annotations__.keys()
