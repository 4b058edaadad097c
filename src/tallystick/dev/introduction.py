"""What `scripts/run` says when everything is ready: where it is, and what to try on it."""

import json
import secrets
from typing import TYPE_CHECKING

from tallystick.dev.catalogue import METER

if TYPE_CHECKING:
    from tallystick.dev.stack import Stack


def introduce(stack: "Stack", key: str) -> str:
    """The text: each part, whose it is, and commands with the API key `key`."""
    settings = stack.settings()
    mode = "live" if settings.livemode else "test"
    own_stripe = f"yours, from STRIPE_API_KEY: {hide_password(settings.stripe_api_base)}, in {mode} mode"
    postgres, redis = (hide_password(stack.environment[name]) for name in ("DATABASE_URL", "REDIS_URL"))
    parts = {
        "API": f"{stack.api_url}      its documentation: {stack.api_url}/docs",
        "Stripe": f"fake, at {stack.stripe_url}" if stack.fake else own_stripe,
        "PostgreSQL": postgres if stack.postgres else f"yours, from DATABASE_URL: {postgres}",
        "Valkey" if stack.valkey else "Redis": redis if stack.valkey else f"yours, from REDIS_URL: {redis}",
        "data, logs": str(stack.data),
    }
    lines = "\n".join(f"  {part:10} {text}" for part, text in parts.items())
    after = _commands(stack.api_url, key) if stack.fake else _what_to_make(settings.customer_reference_key, key)
    return f"\ntallystick is ready.\n\n{lines}\n\n{after}\n\nCtrl-C stops everything."


def hide_password(url: str) -> str:
    """A URL without user, password and options, for a terminal that others may see."""
    scheme, separator, rest = url.partition("://")
    # The last "@": a password may have one, or a "/" or "?", that should have been quoted.
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


def _commands(api_url: str, key: str) -> str:
    usage = json.dumps({"id": secrets.token_hex(4), "customer": "acme", "meter": METER, "value": "2.5"})
    authorization = f'-H "Authorization: Bearer {key}"'
    return f"""Send a usage event, ask what the customer may do, open its portal:

curl {api_url}/v1/usage {authorization} -d '{usage}'
curl {api_url}/v1/customers/acme/access {authorization}
curl {api_url}/v1/portal/sessions {authorization} -H "Content-Type: application/json" -d '{{"customer": "acme"}}'"""


def _what_to_make(reference_key: str, key: str) -> str:
    """The demo catalogue is made at the fake Stripe only."""
    return f"""An API key that may do everything: {key}

Usage needs a meter at your Stripe, and each customer a reference: its metadata {reference_key}.
What is there already comes here by scripts/run sync, in another terminal. README.md has calls to try then."""
