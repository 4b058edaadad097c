"""Rules: what is decided per company rather than per machine, in one small TOML file (`TALLYSTICK_RULES_FILE`).

    [access]                      what each status of a subscription means for the customer
    [webhooks.NAME]               further webhook endpoints, each with its secrets, mode and account
    [[notifications]]             where the product wants to be told of changes

Without the file the defaults hold. A running service reads a changed file again within `REREAD_EVERY`, so secrets
can be rolled without a restart; a file that has become wrong is reported and the last good one kept.
"""

import base64
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

import structlog
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from tallystick.errors import SettingsError

log = structlog.get_logger()

REREAD_EVERY = timedelta(seconds=5)

Access = Literal["active", "grace", "restricted", "none"]
NotificationType = Literal["access.changed", "subscription.changed", "invoice.payment_failed", "usage.parked"]
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

    @field_validator("notifications")
    @classmethod
    def _names_are_unique(cls, endpoints: tuple[NotificationEndpoint, ...]) -> tuple[NotificationEndpoint, ...]:
        if len({endpoint.name for endpoint in endpoints}) < len(endpoints):
            raise ValueError("two endpoints have the same name")
        return endpoints


def load_rules(path: Path | None) -> Rules:
    """Read the file; the defaults without one. Raises `SettingsError` whose one line names the file and the key."""
    if path is None:
        return Rules()
    try:
        return Rules.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"TALLYSTICK_RULES_FILE {path}: {error}") from None
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = str(problem["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"TALLYSTICK_RULES_FILE {path}: {key}: {message}") from None


@dataclass
class RulesFile:
    """The rules as last read by this process."""

    path: Path | None
    rules: Rules = field(init=False)
    changed_at: int = field(init=False, default=0)
    looked_at: datetime = field(init=False, default=datetime.min.replace(tzinfo=UTC))

    def __post_init__(self) -> None:
        self.rules = load_rules(self.path)
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
                self.rules = load_rules(self.path)
                log.info("rules_read", file=str(self.path))
            except SettingsError as error:
                log.error("rules_not_read", error=str(error))
        return self.rules

    def _changed_at(self) -> int:
        try:
            return self.path.stat().st_mtime_ns if self.path else 0
        except OSError:
            return -1
