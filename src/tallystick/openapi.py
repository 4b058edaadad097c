"""What `/docs` says about the plain routes, which FastAPI cannot see into."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tallystick.usage.events import MAX_AGE, MAX_AHEAD, MAX_DECIMALS, MAX_DIGITS, MAX_EVENTS, MAX_TEXT

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
            "meter": _TEXT | {"description": "The `event_name` of a Stripe meter with the formula sum."},
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
        },
    },
}

_USAGE_ANSWER = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/UsageAnswer"}}}}

PATHS: dict[str, Any] = {
    "/v1/usage": {
        "post": {
            "tags": ["usage"],
            "summary": "Post usage",
            "description": "One event or an array of them. 202 once every accepted event is on disk. After a 429, a 5xx"
            " or no answer at all, send the same events again. Needs the scope `usage:write`.",
            "operationId": "post_usage",
            "security": [{"HTTPBearer": []}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {
                            "oneOf": [
                                {"$ref": "#/components/schemas/UsageEvent"},
                                {
                                    "type": "array",
                                    "minItems": 1,
                                    "maxItems": MAX_EVENTS,
                                    "items": {"$ref": "#/components/schemas/UsageEvent"},
                                },
                            ]
                        },
                        "example": [{"id": "req-1", "customer": "acme", "meter": "api_requests", "value": "1.5"}],
                    }
                },
            },
            "responses": {
                "202": {"description": "Every event was accepted, was a duplicate, or is listed as rejected"}
                | _USAGE_ANSWER,
                "400": PROBLEM,
                "401": PROBLEM,
                "403": PROBLEM,
                "413": PROBLEM,
                "422": {
                    "description": "All events were rejected, or there were none",
                    "content": _USAGE_ANSWER["content"] | PROBLEM["content"],  # type: ignore[operator]
                },
                "429": PROBLEM,
                "503": PROBLEM,
            },
        }
    },
    "/webhooks/stripe": {
        "post": {
            "tags": ["webhooks"],
            "summary": "Receive a Stripe event",
            "description": "For Stripe. 200 after the commit and for repeats; 400 for what cannot be trusted; 5xx when"
            " it could not be stored, so that Stripe retries.",
            "operationId": "receive_stripe_event",
            "parameters": [
                {"name": "Stripe-Signature", "in": "header", "required": True, "schema": {"type": "string"}}
            ],
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
                                        "enum": ["applied", "stale", "duplicate", "ignored", "quarantined"],
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
        responses.setdefault("503", PROBLEM)
    for status, response in responses.items():
        if status[0] in "45" and "content" not in response:
            response["content"] = PROBLEM["content"]
