"""`/docs`: the OpenAPI document as one plain page. It runs no script and loads nothing, from here or from elsewhere."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h2{margin-top:3rem;border-bottom:1px solid #ccc}h3{margin-top:2.5rem}h3 code{font-size:1.05rem}"
    "code,pre{font-family:ui-monospace,monospace;font-size:.9rem}pre{background:#f5f5f5;padding:1rem;overflow:auto}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}"
    "summary{cursor:pointer}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
}


def reference_route(app: FastAPI) -> Route:
    """The route of the page. It is written when it is first asked for."""
    written: list[str] = []

    async def get_reference(request: Request) -> Response:
        if not written:
            written.append(write_reference(app.openapi()))
        return HTMLResponse(written[0], headers=HEADERS)

    return Route("/docs", get_reference, methods=["GET"], include_in_schema=False)


def write_reference(document: Mapping[str, Any]) -> str:
    """The page for an OpenAPI document: every operation by its tag, then the schemas that they refer to."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation.get("tags", ["more"])[0], []).append(
                _operation(method.upper(), path, operation)
            )
    parts = [f"<h2>{escape(tag)}</h2>{''.join(operations)}" for tag, operations in by_tag.items()]
    schemas = "".join(
        f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3>{_json(schema)}'
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f'<p>{escape(info["summary"])}</p><p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(parts)}<h2>Schemas</h2>{schemas}</body></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parameters = [
        f"<tr><td><code>{escape(parameter['name'])}</code></td>"
        f"<td>{escape(parameter['in'])}{', required' if parameter.get('required') else ''}</td>"
        f"<td>{_text(parameter.get('description', ''))}</td></tr>"
        for parameter in operation.get("parameters", [])
    ]
    bodies = [
        f"<details><summary>Body: <code>{escape(media_type)}</code></summary>{_json(content)}</details>"
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items()
    ]
    answers = [
        f"<details><summary><code>{escape(status)}</code> {_text(answer['description'])}</summary>"
        f"{_json(answer.get('content', {}))}</details>"
        for status, answer in operation["responses"].items()
    ]
    return (
        f"<h3><code>{method} {escape(path)}</code></h3><p>{escape(operation['summary'])}</p>"
        f"<p>{_text(operation.get('description', ''))}</p><table>{''.join(parameters)}</table>"
        f"{''.join(bodies)}{''.join(answers)}"
    )


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _json(value: object) -> str:
    written = escape(json.dumps(value, indent=2, ensure_ascii=False))
    # What a schema refers to is further down on the page.
    return f"<pre>{re.sub(r'#/components/schemas/([A-Za-z0-9]+)', _link, written)}</pre>"


def _link(found: re.Match[str]) -> str:
    return f'<a href="#{found[1]}">{found[1]}</a>'
