"""Rules: what is decided per company rather than per machine, in one small TOML file (`TALLYSTICK_RULES_FILE`).

    [access]                      what each status of a subscription means for the customer
    [webhooks.NAME]               further webhook endpoints, each with its secrets, mode and account
    [[notifications]]             where the product wants to be told of changes
    [meters.NAME]                 what is known of a meter beside what Stripe says of it
    [usage]                       what is done with usage that comes too late for its invoice

Without the file the defaults hold. A running service reads a changed file again within `REREAD_EVERY`, so secrets
can be rolled without a restart; a file that has become wrong is reported and the last good one kept.
"""

import base64
import builtins
import re
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import structlog
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from tallystick.errors import SettingsError

log = structlog.get_logger()

REREAD_EVERY = timedelta(seconds=5)

Access = Literal["active", "grace", "restricted", "none"]
NotificationType = Literal[
    "access.changed",
    "subscription.changed",
    "invoice.payment_failed",
    "usage.parked",
    "usage.correction_proposed",
    "usage.threshold_reached",
]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccessRules(_Section):
    """What a subscription's status gives; `grace_days` after a failed payment the access is `grace` instead."""

    grace_days: int = Field(default=0, ge=0, le=90)
    trialing: Access = "active"
    past_due: Access = "restricted"
    unpaid: Access = "restricted"
    paused: Access = "restricted"
    incomplete: Access = "none"
    one_off_invoices: Literal["ignored", "restrict"] = "ignored"


class WebhookEndpoint(_Section):
    """A webhook endpoint at `/webhooks/stripe/NAME`: whose events it takes, and what they are signed with."""

    secrets: Annotated[tuple[SecretStr, ...], Field(min_length=1)]
    livemode: bool
    account: Annotated[str, Field(pattern=r"^(|\*|acct_\w+)$")] = ""

    @field_validator("secrets")
    @classmethod
    def _secrets_look_right(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        # An empty key is a valid HMAC key: whoever signs with it would be believed.
        if any(len(secret.get_secret_value()) < 8 for secret in secrets):
            raise ValueError("each secret must have at least 8 characters, as in whsec_…")
        return secrets


def _read_quantity(given: Any) -> Decimal:
    # TOML's own decimals are floats, which are not exact; and Decimal() also takes "NaN" and "1_000".
    if isinstance(given, str) and QUANTITY.fullmatch(given):
        return Decimal(given)
    if isinstance(given, int) and not isinstance(given, bool):
        return Decimal(given)
    raise ValueError('a quantity is written as a string of digits, as in "0.5", or as a whole number')


QUANTITY = re.compile(r"[0-9]{1,15}(\.[0-9]{1,12})?")
Quantity = Annotated[Decimal, BeforeValidator(_read_quantity), Field(gt=0)]

# Whatever is named by people, here and in requests: PostgreSQL refuses NUL, and nobody means the other control
# characters.
PLAIN_TEXT = r"^[^\x00-\x1f\x7f]+$"

# Both as in a usage event (usage/events.py): what cannot be sent need not be declared.
MAX_PROPERTIES = 10
Text = Annotated[str, Field(min_length=1, max_length=100, pattern=PLAIN_TEXT)]


class MeterRules(_Section):
    """What Stripe's meter itself does not say.

    `sender`: how its usage is told to Stripe, if not as `TALLYSTICK_SENDER` says; `usage_records` needs the `price`,
    for there is no meter at Stripe then. `aggregation`: what is computed here and told to a `last` meter of Stripe's;
    `unique_count` counts the values of `property`. `properties` may be sent with an event, and grouped by.
    """

    sender: Literal["meter_events", "meter_event_stream", "usage_records"] | None = None
    price: Annotated[str, Field(pattern=r"^price_\w+$")] | None = None
    properties: tuple[Text, ...] = ()
    aggregation: Literal["max", "unique_count"] | None = None
    property: Text | None = None
    thresholds: tuple[Quantity, ...] = ()
    quota: Quantity | None = None

    @field_validator("thresholds")
    @classmethod
    def _thresholds_ascend(cls, thresholds: tuple[Decimal, ...]) -> tuple[Decimal, ...]:
        if any(one >= next_ for one, next_ in pairwise(thresholds)):
            raise ValueError("each must be greater than the one before")
        return thresholds

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sender == "usage_records" and self.price is None:
            raise ValueError('sender = "usage_records" needs price = "price_…", whose usage it records')
        if self.price is not None and self.sender != "usage_records":
            raise ValueError('price needs sender = "usage_records": other senders tell a meter, and not a price')
        if self.sender == "usage_records" and self.aggregation is not None:
            raise ValueError(f'aggregation = "{self.aggregation}" cannot be told by usage records, which add up')
        if self.aggregation == "unique_count" and self.property is None:
            raise ValueError('aggregation = "unique_count" needs property = "…", whose values it counts')
        if self.property is not None and self.aggregation != "unique_count":
            raise ValueError('property needs aggregation = "unique_count": nothing else reads it')
        if len(set(self.properties)) < len(self.properties):
            raise ValueError("properties: one is named twice")
        if len(self.declared) > MAX_PROPERTIES:
            raise ValueError(f"an event has at most {MAX_PROPERTIES} properties")
        return self

    @builtins.property  # a field has the name
    def declared(self) -> frozenset[str]:
        """The properties that an event for this meter may have."""
        return frozenset((*self.properties, *([self.property] if self.property else [])))


class UsageRules(_Section):
    """`late`: usage whose invoice is final is parked, or carried into the open period."""

    late: Literal["park", "carry"] = "park"


class NotificationEndpoint(_Section):
    """Where notifications are sent. The first secret signs, and so does each other one while it is being rolled."""

    name: Name
    url: Annotated[str, Field(pattern=r"^https?://[^\s@]+$", max_length=2000)]
    secrets: Annotated[tuple[SecretStr, ...], Field(min_length=1)]
    events: tuple[NotificationType | Literal["*"], ...] = ("*",)
    allow_private_network: bool = False

    @field_validator("url")
    @classmethod
    def _url_has_a_host(cls, url: str) -> str:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:  # `port` raises ValueError when it is no port at all
            raise ValueError("it names no host that one can connect to")
        return url

    @field_validator("secrets")
    @classmethod
    def _secrets_are_keys(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        # The form and the length that Standard Webhooks asks for.
        for secret in secrets:
            prefix, separator, encoded = secret.get_secret_value().partition("_")
            try:
                key = base64.b64decode(encoded, validate=True)
            except ValueError:
                key = b""
            if prefix + separator != "whsec_" or not 24 <= len(key) <= 64:
                raise ValueError("each secret must be whsec_ and 24 to 64 random bytes in base64")
        return secrets

    @model_validator(mode="after")
    def _plain_http_stays_inside(self) -> Self:
        if self.url.startswith("http://") and not self.allow_private_network:
            raise ValueError(f"{self.name}: an http:// address needs allow_private_network = true")
        return self


class Rules(_Section):
    """The whole file."""

    access: AccessRules = AccessRules()
    webhooks: dict[Name, WebhookEndpoint] = Field(default_factory=dict)
    notifications: tuple[NotificationEndpoint, ...] = ()
    meters: dict[Text, MeterRules] = Field(default_factory=dict)
    usage: UsageRules = UsageRules()

    @field_validator("notifications")
    @classmethod
    def _names_are_unique(cls, endpoints: tuple[NotificationEndpoint, ...]) -> tuple[NotificationEndpoint, ...]:
        if len({endpoint.name for endpoint in endpoints}) < len(endpoints):
            raise ValueError("two endpoints have the same name")
        return endpoints

    @field_validator("meters")
    @classmethod
    def _prices_are_unique(cls, meters: dict[str, MeterRules]) -> dict[str, MeterRules]:
        # Usage records replace each other: one of the two would erase the other's usage.
        prices = [meter.price for meter in meters.values() if meter.price is not None]
        if len(set(prices)) < len(prices):
            raise ValueError("two meters have the same price")
        return meters


# What each entry of the file is made of.
SECTIONS: dict[int | str, type[BaseModel]] = {
    "access": AccessRules,
    "webhooks": WebhookEndpoint,
    "notifications": NotificationEndpoint,
    "meters": MeterRules,
    "usage": UsageRules,
}


def load_rules(path: Path | None) -> Rules:
    """Read the file; the defaults without one. Raises `SettingsError` whose one line names the file and the key."""
    if path is None:
        return Rules()
    try:
        return Rules.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise SettingsError(f"TALLYSTICK_RULES_FILE {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"TALLYSTICK_RULES_FILE {path}: {error}") from None
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            section = SECTIONS.get(problem["loc"][0], Rules) if len(problem["loc"]) > 1 else Rules
            message = f"there is no such entry; there are: {', '.join(section.model_fields)}"
        raise SettingsError(f"TALLYSTICK_RULES_FILE {path}: {key}: {message}") from None


@dataclass
class RulesFile:
    """The rules as last read by this process."""

    path: Path | None
    rules: Rules = field(init=False)
    read_at: datetime = field(init=False)
    changed_at: int = field(init=False, default=0)
    looked_at: datetime = field(init=False, default=datetime.min.replace(tzinfo=UTC))

    def __post_init__(self) -> None:
        self.rules, self.read_at = load_rules(self.path), datetime.now(UTC)
        self.changed_at = self._changed_at()

    def current(self, now: datetime) -> Rules:
        """The rules, read again when the file has changed since they were."""
        if self.path is None or now - self.looked_at < REREAD_EVERY:
            return self.rules
        self.looked_at = now
        changed_at = self._changed_at()
        if changed_at != self.changed_at:
            self.changed_at = changed_at
            try:
                self.rules, self.read_at = load_rules(self.path), now
                log.info("rules_read", file=str(self.path))
            except SettingsError as error:
                log.error("rules_not_read", error=str(error))
        return self.rules

    def _changed_at(self) -> int:
        try:
            return self.path.stat().st_mtime_ns if self.path else 0
        except OSError:
            return -1
