"""Bytes of any kind at the places where strangers may send some: every one is answered, and none with a 5xx."""

import gzip
import json
import time
from decimal import Decimal
from typing import Any

import httpx
import pytest
import stripe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tallystick.json_faults import MAX_TOKENS, NoSuchNumber, explain, refuse_constant
from tallystick.resources import Resources
from tests.conftest import WEBHOOK_SECRET
from tests.usage.making import make_meter

any_bytes = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)

# What breaks parsers, to be put between the bytes that hypothesis thinks of.
NASTY = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b'"\\ud800"',
    b"1e999999",
    b"-1e-999999",
    b"NaN",
    b"-Infinity",
    b"9" * 10_000,
    b"0." + b"1" * 10_000,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"id":1,"id":2}',
    b'"' + b"x" * 1_000_000 + b'"',
    b"\xef\xbb\xbf{}",
    b"{}\n" * 2_000,
    gzip.compress(b"{}")[:-3],
]
CONTENT_TYPES = [
    "application/json",
    "application/x-ndjson",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    "text/plain",
    "application/json; charset=utf-16",
    "\xff",
    "",
]
pieces = st.one_of(
    st.sampled_from([*NASTY[:11], NASTY[13], b",", b"[", b"]", b"{", b"}", b":", b'"id"']), st.binary(max_size=8)
)
bodies = st.one_of(
    st.sampled_from(NASTY), st.binary(max_size=200), st.lists(pieces, max_size=12).map(lambda some: b"".join(some))
)
# A header's value may hold everything but a line's end and NUL.
raw = st.binary(max_size=60).map(lambda raw: raw.translate(None, b"\r\n\x00"))
header_values = st.one_of(
    st.sampled_from([b"t=,v1=", b"t=1", b"v1=a", b"t=1,t=2,v1=a,v1=b", b"t=" + b"9" * 9_000 + b",v1=a"]),
    st.just(b"t=\xb2,v1=\xff"),
    raw,
)


@pytest.fixture
async def usage(client: httpx.AsyncClient, resources: Resources) -> httpx.AsyncClient:
    await make_meter(resources)
    return client


def is_answered(answer: httpx.Response) -> bool:
    return answer.status_code < 500 and answer.json() is not None


@any_bytes
@given(body=bodies, header=header_values)
async def test_any_bytes_as_a_webhook(anonymous: httpx.AsyncClient, body: bytes, header: bytes) -> None:
    answer = await anonymous.post("/webhooks/stripe", content=body, headers={b"Stripe-Signature": header})
    assert is_answered(answer)
    assert answer.status_code == 400


# At its edges, and anywhere: t=1769817600,v1=00ff…
places = st.one_of(st.sampled_from([0, 2, 12, 13, 16]), st.integers(0, 90))
some_bytes = st.one_of(st.sampled_from([b"=", b"=x", b",", b",t=1", b"t=", b" ", b"_"]), raw)


@any_bytes
@example(inserted=[(12, b"=x")], cut=0)
@given(inserted=st.lists(st.tuples(places, some_bytes), max_size=3), cut=st.integers(0, 90))
async def test_a_genuine_signature_with_any_bytes_in_it(
    anonymous: httpx.AsyncClient, inserted: list[tuple[int, bytes]], cut: int
) -> None:
    body = json.dumps({"id": "evt_1", "object": "event", "created": 1, "livemode": False, "type": "x", "data": {}})
    header = stripe.WebhookSignature.generate_signature_header(body, WEBHOOK_SECRET).encode()
    for at, some in inserted:
        header = header[:at] + some + header[at:]
    for sent in (header, header[cut:], header[:cut]):
        answer = await anonymous.post("/webhooks/stripe", content=body, headers={b"Stripe-Signature": sent})
        assert answer.status_code in (200, 400), sent


@any_bytes
@given(body=bodies)
async def test_any_bytes_as_a_webhook_that_was_signed(anonymous: httpx.AsyncClient, body: bytes) -> None:
    signature = f"t={int(time.time())},v1=none"
    if is_utf8(body):
        signature = stripe.WebhookSignature.generate_signature_header(body.decode(), WEBHOOK_SECRET)
    answer = await anonymous.post("/webhooks/stripe", content=body, headers={"Stripe-Signature": signature})
    assert is_answered(answer)


def is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


# A JSON value of any form in each place of an event that Stripe signed, as if Stripe had changed its mind.
any_json = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(["", "\x00", "\ud800", "x" * 5_000, "cus_1", "active", 10**400, -1]),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["id", "data", "x"]), inner)),
    max_leaves=4,
)
fields = st.dictionaries(
    st.sampled_from(["id", "object", "customer", "status", "items", "metadata", "lines", "parent", "price", "deleted"]),
    any_json,
    max_size=5,
)


@any_bytes
@given(
    type_=st.sampled_from(["customer.updated", "customer.subscription.updated", "invoice.paid", "price.created", "x"]),
    payload=st.one_of(fields, any_json),
    envelope=st.dictionaries(
        st.sampled_from(["id", "created", "livemode", "account", "api_version", "data"]), any_json, max_size=1
    ),
)
async def test_an_event_of_any_form_is_given_a_verdict(
    anonymous: httpx.AsyncClient, type_: str, payload: Any, envelope: dict[str, Any]
) -> None:
    event = {
        "id": "evt_1",
        "object": "event",
        "created": int(time.time()),
        "livemode": False,
        "type": type_,
        "data": {"object": payload},
    } | envelope
    body = json.dumps(event)
    signature = stripe.WebhookSignature.generate_signature_header(body, WEBHOOK_SECRET)
    answer = await anonymous.post("/webhooks/stripe", content=body, headers={"Stripe-Signature": signature})
    assert is_answered(answer), answer.text
    assert answer.status_code == 400 or "verdict" in answer.json()


@any_bytes
@given(body=bodies, content_type=st.sampled_from(CONTENT_TYPES), encoding=st.sampled_from(["", "gzip", "br"]))
async def test_any_bytes_as_usage(usage: httpx.AsyncClient, body: bytes, content_type: str, encoding: str) -> None:
    headers = {b"Content-Type": content_type.encode("latin-1"), b"Content-Encoding": encoding.encode()}
    for content in (body, gzip.compress(body, 1)):
        answer = await usage.post("/v1/usage", content=content, headers=headers)
        assert is_answered(answer)
        assert 400 <= answer.status_code < 500


@any_bytes
@given(
    event=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("id", "customer", "meter", "value", "timestamp", "specversion", "x\x00"), any_json),
    ),
    content_type=st.sampled_from(CONTENT_TYPES[:4]),
)
async def test_an_event_of_any_form_is_refused_by_name(
    usage: httpx.AsyncClient, event: dict[str, Any], content_type: str
) -> None:
    answer = await usage.post("/v1/usage", content=json.dumps(event), headers={"Content-Type": content_type})
    assert is_answered(answer), answer.text
    assert answer.status_code in (202, 413, 422)


@any_bytes
@given(body=bodies, credentials=header_values)
async def test_any_bytes_at_the_other_doors(anonymous: httpx.AsyncClient, body: bytes, credentials: bytes) -> None:
    headers = {b"Authorization": b"Bearer " + credentials, b"Content-Type": b"application/json"}
    for method, path in (("POST", "/v1/portal/sessions"), ("POST", "/v1/access"), ("PUT", "/v1/customers/acme")):
        answer = await anonymous.request(method, path, content=body, headers=headers)
        assert is_answered(answer)
        assert 400 <= answer.status_code < 500


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b'{"id":"e","customer":"a","meter":"m","value":1e999999}', 422, "value"),
        (b'{"id":"e","customer":"a","meter":"m","value":"1e999999"}', 422, "value"),
        (b'{"id":"e","customer":"a","meter":"m","value":1e9999999999999999999}', 400, "value"),
        (b'{"id":"e","customer":"a","meter":"m","value":NaN}', 400, "value"),
        (b'{"id":"e","customer":"a","meter":"m","value":"NaN"}', 422, "value"),
        (b'{"id":"e","customer":"a","meter":"m","value":-Infinity}', 400, "value"),
        (b'{"id":"e","customer":"a","meter":"m","value":' + b"9" * 10_000 + b"}", 422, "value"),
        (b'{"id":"e","customer":"a","meter":"m","value":"' + b"9" * 10_000 + b'"}', 422, "value"),
        (b'{"id":"e","customer":"a","meter":"m","timestamp":' + b"9" * 10_000 + b"}", 422, "timestamp"),
        (b'{"id":"e","customer":"a","meter":"m","timestamp":1e999999}', 422, "timestamp"),
        (b'{"id":"e\\u0000","customer":"a","meter":"m"}', 422, "'id'"),
        (b'{"id":"e","customer":"\\ud800","meter":"m"}', 422, "'customer'"),
        (b'{"id":"e","customer":"a","meter":"\\udfff"}', 422, "'meter'"),
        (b'{"id":"' + b"x" * 1_000_000 + b'","customer":"a","meter":"m"}', 422, "'id'"),
        (b'{"id":"e","id":"f","customer":"a","meter":"m"}', 422, "'id'"),
        (b'{"id":"e","customer":"a","meter":"m","' + b"x" * 1_000_000 + b'":1}', 422, "xxxxx"),
        (b'{"id":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "id.0.0.0.0"),
        (b'{"id":"\xff","customer":"a","meter":"m"}', 400, "id"),
    ],
    ids=lambda value: str(value[:60]) if isinstance(value, bytes) else "",
)
async def test_each_limit_of_usage_is_named(usage: httpx.AsyncClient, body: bytes, status: int, named: str) -> None:
    answer = await usage.post("/v1/usage", content=body)
    assert answer.status_code == status
    if status == 422:
        assert named in answer.json()["rejected"][0]["message"]
    else:
        assert (answer.json()["field"], repr(named) in answer.json()["detail"]) == (named, True)
    assert len(answer.content) < 1_000


# What is no JSON, as a value in it, and what the answer says of it.
NO_JSON = {
    "no number NaN": b"NaN",
    "no number -Infinity": b"-Infinity",
    "nested too deeply": b"[" * 100_000 + b"]" * 100_000,
    "is not UTF-8": b'"\xff"',
    "column ": b"soon",
    "cannot be read": b'"never closed',
}


@pytest.mark.parametrize("said", [*NO_JSON, "beyond all bounds"])
async def test_usage_that_is_no_json_is_named_by_its_field(usage: httpx.AsyncClient, said: str) -> None:
    value = NO_JSON.get(said, b"1e9999999999999999999")
    single = b'{"id":"e\\",","customer":"a","value":' + value + b"}"
    batch = b'[{"id":"d"},[1,{}],' + single + b"]"
    for body, type_, field in (
        (single, "application/json", "value"),
        (batch, "application/json", "2.value"),
        (batch, "application/cloudevents-batch+json", "2.value"),
    ):
        answer = await usage.post("/v1/usage", content=body, headers={"Content-Type": type_})
        assert (answer.status_code, answer.json()["type"]) == (400, "urn:tallystick:problem:invalid-json")
        assert answer.json()["field"].startswith(field)
        assert said in answer.json()["detail"]
        assert f"in the field '{field}" in answer.json()["detail"]
    lines = await usage.post("/v1/usage", content=b"{}\n" + single, headers={"Content-Type": "application/x-ndjson"})
    [_, rejected] = lines.json()["rejected"]
    assert (rejected["index"], said in rejected["message"]) == (1, True)
    assert "in the field 'value" in rejected["message"]


@pytest.mark.parametrize("said", [*NO_JSON, "beyond all bounds"])
async def test_a_body_that_is_no_json_is_named_by_its_field(client: httpx.AsyncClient, said: str) -> None:
    value = NO_JSON.get(said, b"9" * 5_000)
    for method, path, before, after, field in (
        ("POST", "/v1/access", b'{"customers":["a",', b"]}", "customers.1"),
        ("POST", "/v1/portal/sessions", b'{"customer":', b"}", "customer"),
        ("PUT", "/v1/customers/acme", b'{"customer":', b"}", "customer"),
        ("POST", "/v1/usage/corrections", b'{"id":', b"}", "id"),
        ("POST", "/v1/usage/parked/1-1/void", b'{"note":', b"}", "note"),
    ):
        answer = await client.request(
            method, path, content=before + value + after, headers={"Content-Type": "application/json"}
        )
        problem = answer.json()
        fields = [each["field"] for each in problem["errors"]] if "errors" in problem else [problem["field"]]
        assert any(each.startswith(field) for each in fields), (path, problem)
        if "number" in said and "beyond" not in said:  # which Python reads, and which is none of the values that may be
            assert answer.status_code == 422
        else:
            assert (answer.status_code, problem["type"]) == (400, "urn:tallystick:problem:invalid-json")
            assert said in problem["detail"]


@pytest.mark.parametrize("said", [*NO_JSON, "beyond all bounds"])
async def test_a_webhook_that_is_no_json_is_named_by_its_field(anonymous: httpx.AsyncClient, said: str) -> None:
    value = NO_JSON.get(said, b"9" * 5_000)
    body = b'{"id":"evt_1","data":{"object":{"lines":[1,' + value + b"]}}}"
    text = body.decode("utf-8", "replace")
    signature = stripe.WebhookSignature.generate_signature_header(text, WEBHOOK_SECRET)
    answer = await anonymous.post("/webhooks/stripe", content=body, headers={"Stripe-Signature": signature})
    assert (answer.status_code, answer.json()["type"]) == (400, "urn:tallystick:problem:webhook-body-invalid")
    if said == "is not UTF-8":  # nothing is known of who sent it, so nothing is looked for in it
        assert "byte 45" in answer.json()["detail"]
    else:
        assert said in answer.json()["detail"]
        assert answer.json()["field"].startswith("data.object.lines.1")


@pytest.mark.parametrize("member", ["id", "type", "created", "livemode", "account"])
async def test_what_an_event_lacks_is_named(anonymous: httpx.AsyncClient, member: str) -> None:
    event = {"id": "evt_1", "object": "event", "created": 1, "livemode": False, "type": "x", member: []}
    signature = stripe.WebhookSignature.generate_signature_header(json.dumps(event), WEBHOOK_SECRET)
    answer = await anonymous.post(
        "/webhooks/stripe", content=json.dumps(event), headers={"Stripe-Signature": signature}
    )
    assert (answer.status_code, answer.json()["field"]) == (400, member)


@any_bytes
@given(body=bodies)
def test_whatever_is_no_json_is_explained(body: bytes) -> None:
    try:
        json.loads(body, parse_float=Decimal, parse_constant=refuse_constant)
    except (ValueError, ArithmeticError, RecursionError) as error:
        reason, field = explain(body, error)
        assert reason
        assert field is None or 0 < len(field) < 600


def test_a_fault_is_not_looked_for_without_end() -> None:
    for values, field in ((10, "events.10"), (MAX_TOKENS, None)):
        body = b'{"events":[' + b"1," * values + b"NaN]}"
        with pytest.raises(NoSuchNumber) as raised:
            json.loads(body, parse_constant=refuse_constant)
        assert explain(body, raised.value) == ("it has no number NaN", field)
