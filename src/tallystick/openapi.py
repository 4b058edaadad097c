"""What `/docs` says about the plain routes, which FastAPI cannot see into."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tallystick.usage.events import MAX_AGE, MAX_AHEAD, MAX_DECIMALS, MAX_DIGITS, MAX_EVENTS, MAX_PROPERTIES, MAX_TEXT
from tallystick.usage.formats import CLOUDEVENT, CLOUDEVENTS_BATCH, JSON, NDJSON

PROBLEM = {
    "description": "A problem (RFC 9457)",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}

_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}

SCHEMAS: dict[str, Any] = {
    "Problem": {
        "type": "object",
        "required": ["type", "title", "status"],
        "properties": {
            "type": {"type": "string", "description": "Stable: programs may act on it."},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "field": {"type": "string", "description": "The field or parameter to blame, where there is one."},
        },
    },
    "UsageEvent": {
        "type": "object",
        "required": ["id", "customer", "meter"],
        "additionalProperties": False,
        "properties": {
            "id": _TEXT | {"description": "Yours, unique for each use; repeats of it count once."},
            "customer": _TEXT | {"description": "Your own reference of the customer, or its `cus_…` id."},
            "meter": _TEXT | {"description": "The `event_name` of a Stripe meter."},
            "value": {
                "oneOf": [{"type": "number"}, {"type": "string"}],
                "default": 1,
                "description": f"An exact decimal of at most {MAX_DIGITS} digits, {MAX_DECIMALS} after the point.",
            },
            "timestamp": {
                "oneOf": [{"type": "string", "format": "date-time"}, {"type": "number"}],
                "description": "When it was used: RFC 3339 with a time zone, or Unix seconds; at most"
                f" {MAX_AGE.days} days ago and {MAX_AHEAD.seconds // 60} minutes ahead. Default: when it is received.",
            },
            "properties": {
                "type": "object",
                "maxProperties": MAX_PROPERTIES,
                "additionalProperties": _TEXT,
                "description": "Those that the meter's rules declare.",
            },
        },
    },
    "CloudEvent": {
        "type": "object",
        "description": "CloudEvents 1.0; extension attributes are allowed. Its id as a usage event is `<source> <id>`.",
        "required": ["specversion", "id", "source", "type", "subject"],
        "properties": {
            "specversion": {"const": "1.0"},
            "id": _TEXT | {"description": "Unique within its source."},
            "source": _TEXT | {"format": "uri-reference"},
            "type": _TEXT | {"description": "The meter."},
            "subject": _TEXT | {"description": "The customer."},
            "time": {"type": "string", "format": "date-time", "description": "As the timestamp of a usage event."},
            "datacontenttype": {"type": "string", "default": "application/json"},
            "data": {
                "type": "object",
                "required": ["value"],
                "properties": {"value": {"$ref": "#/components/schemas/UsageEvent/properties/value"}},
                "description": "Without it, the value is 1. Members that the meter's rules declare are properties.",
            },
        },
    },
    "UsageAnswer": {
        "type": "object",
        "required": ["accepted", "duplicates", "rejected"],
        "properties": {
            "accepted": {"type": "integer"},
            "duplicates": {"type": "integer", "description": "Sent before; nothing is counted twice."},
            "rejected": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["index", "id", "code", "message"],
                    "properties": {
                        "index": {"type": "integer"},
                        "id": {"type": ["string", "null"]},
                        "code": {"type": "string"},
                        "message": {"type": "string"},
                    },
                },
            },
            "results": {
                "type": "array",
                "description": "Only with `results=all`: one for each event, in the order of the request.",
                "items": {
                    "type": "object",
                    "required": ["index", "id", "result"],
                    "properties": {
                        "index": {"type": "integer"},
                        "id": {"type": ["string", "null"]},
                        "result": {"enum": ["accepted", "duplicate", "conflict", "rejected"]},
                        "code": {"type": "string", "description": "Of a conflict or a rejected event."},
                        "message": {"type": "string", "description": "Of a conflict or a rejected event."},
                    },
                },
            },
        },
    },
}


def _one_or_many(name: str) -> dict[str, Any]:
    return {"oneOf": [{"$ref": f"#/components/schemas/{name}"}, _many(name)]}


def _many(name: str, least: int = 1) -> dict[str, Any]:
    return {
        "type": "array",
        "minItems": least,
        "maxItems": MAX_EVENTS,
        "items": {"$ref": f"#/components/schemas/{name}"},
    }


_USAGE_ANSWER = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/UsageAnswer"}}}}

_WEBHOOK: dict[str, Any] = {
    "tags": ["webhooks"],
    "summary": "Receive a Stripe event",
    "description": "For Stripe. 200 after the commit and for repeats; 400 for what cannot be trusted; 5xx when"
    " it could not be stored, so that Stripe retries.",
    "operationId": "receive_stripe_event",
    "parameters": [{"name": "Stripe-Signature", "in": "header", "required": True, "schema": {"type": "string"}}],
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
    "responses": {
        "200": {
            "description": "What became of the event",
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["verdict"],
                        "properties": {
                            "verdict": {
                                "enum": ["applied", "stale", "duplicate", "ignored", "quarantined", "not_served"],
                            }
                        },
                    }
                }
            },
        },
        "400": PROBLEM,
        "413": PROBLEM,
        "500": PROBLEM,
    },
}


PATHS: dict[str, Any] = {
    "/v1/usage": {
        "post": {
            "tags": ["usage"],
            "summary": "Post usage",
            "description": f"Up to {MAX_EVENTS} events and 1 MiB a request, as JSON, NDJSON or CloudEvents (also in"
            " binary mode, with `ce-…` headers). No Content-Type, and curl's `application/x-www-form-urlencoded`, are"
            " read as JSON. 202 once every accepted event is on disk. After a 429, a 5xx or no answer at all, send the"
            " same events again. Needs the scope `usage:write`.",
            "operationId": "post_usage",
            "security": [{"HTTPBearer": []}],
            "parameters": [
                {
                    "name": "results",
                    "in": "query",
                    "description": "`all`: say of each event what became of it, not only of those that were rejected.",
                    "schema": {"enum": ["all"]},
                },
                {
                    "name": "Content-Encoding",
                    "in": "header",
                    "description": "The limit of 1 MiB is that of the decompressed body.",
                    "schema": {"enum": ["gzip", "identity"], "default": "identity"},
                },
            ],
            "requestBody": {
                "required": True,
                "content": {
                    JSON: {
                        "schema": _one_or_many("UsageEvent"),
                        "example": [{"id": "req-1", "customer": "acme", "meter": "api_requests", "value": "1.5"}],
                    },
                    **{
                        media_type: {"schema": {"type": "string", "description": "One UsageEvent a line."}}
                        for media_type in sorted(NDJSON)
                    },
                    CLOUDEVENT: {"schema": {"$ref": "#/components/schemas/CloudEvent"}},
                    CLOUDEVENTS_BATCH: {"schema": _many("CloudEvent", least=0)},
                },
            },
            "responses": {
                "202": {"description": "Every event was accepted, was a duplicate, or is listed as rejected"}
                | _USAGE_ANSWER,
                "400": PROBLEM,
                "401": PROBLEM,
                "403": PROBLEM,
                "413": PROBLEM,
                "415": PROBLEM,
                "422": {
                    "description": "All events were rejected, or there were none",
                    "content": _USAGE_ANSWER["content"] | PROBLEM["content"],  # type: ignore[operator]
                },
                "429": PROBLEM,
                "503": PROBLEM,
            },
        }
    },
    "/webhooks/stripe": {"post": _WEBHOOK},
    "/webhooks/stripe/{endpoint}": {
        "post": _WEBHOOK
        | {
            "summary": "Receive a Stripe event at another endpoint",
            "operationId": "receive_stripe_event_at_endpoint",
            "parameters": [
                {"name": "endpoint", "in": "path", "required": True, "schema": {"type": "string"}},
                *_WEBHOOK["parameters"],
            ],
            "responses": _WEBHOOK["responses"] | {"404": PROBLEM},
        }
    },
    "/v1/customers/{ref}/access": {
        "get": {
            "tags": ["customers"],
            "summary": "Ask for a customer's access",
            "description": "Whether the customer may use the product. Needs the scope `access:read`. With the answer's"
            " `ETag` in `If-None-Match` the answer is 304 while nothing has changed.",
            "operationId": "get_access",
            "security": [{"HTTPBearer": []}],
            "parameters": [
                {
                    "name": "ref",
                    "in": "path",
                    "required": True,
                    "description": "The product's own reference, or a `cus_…` id.",
                    "schema": _TEXT,
                    "example": "acme",
                }
            ],
            "responses": {
                "200": {
                    "description": "The access",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CustomerAccess"}}},
                },
                "304": {"description": "It is still what the ETag says"},
                "404": {"description": "No customer is known by this name"},
                "422": PROBLEM,
            },
        }
    },
    "/healthz": {
        "get": {
            "tags": ["operation"],
            "summary": "Whether the process answers",
            "operationId": "get_health",
            "responses": {"200": {"description": "It does"}},
        }
    },
    "/readyz": {
        "get": {
            "tags": ["operation"],
            "summary": "Whether requests can be served, and which part is not ready",
            "operationId": "get_readiness",
            "responses": {"200": {"description": "Ready, or degraded"}, "503": {"description": "Not ready"}},
        }
    },
    "/metrics": {
        "get": {
            "tags": ["operation"],
            "summary": "Prometheus metrics of this process",
            "operationId": "get_metrics",
            "responses": {"200": {"description": "The text format", "content": {"text/plain": {}}}},
        }
    },
}


def describe_plain_routes(app: FastAPI) -> None:
    """Make `app.openapi()` include the plain routes, and problems as the answer to what is not valid."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            for path, operations in PATHS.items():
                schema["paths"][path] = operations | schema["paths"].get(path, {})
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            components.update(SCHEMAS)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    _answer_with_problems(operation)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _answer_with_problems(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    if "422" in responses and "HTTPValidationError" in str(responses["422"]):
        responses["422"] = PROBLEM
    if operation.get("security"):
        responses.setdefault("401", PROBLEM)
        responses.setdefault("403", PROBLEM)
        responses.setdefault("429", PROBLEM)  # for keys with a limit
        responses.setdefault("503", PROBLEM)
    for status, response in responses.items():
        if status[0] in "45" and "content" not in response:
            response["content"] = PROBLEM["content"]
