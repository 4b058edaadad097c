"""Settings: one frozen object, read from the environment once and passed down.

`load_settings()` is the only reader of the environment. A missing or wrong value raises `SettingsError`, whose text
names the variable, so that the start stops with one line instead of a traceback.
"""

import os
import re
import ssl
from collections.abc import Iterator
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlencode, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from tallystick.errors import SettingsError

# As browsers write an origin: lower case, the host as ASCII, no path. Nothing that could stand for many.
ORIGIN = re.compile(r"https?://(?:[a-z0-9-]+(?:\.[a-z0-9-]+)*|\[[0-9a-f:]+\])(?::[1-9][0-9]{0,4})?")
PREFIX = "TALLYSTICK_"
# What `tallystick run` reads beside the settings (dev/stack.py).
OF_RUN = ("TALLYSTICK_FAKE_STRIPE_PORT",)
# A letter too many, too few or in another's place is above it. Below it is what Kubernetes sets where a service has our
# name: TALLYSTICK_SERVICE_PORT, TALLYSTICK_METRICS_PORT and the like.
ALIKE = 0.9

# Only who receives webhooks needs it, and `webhooks setup` must run before there is one.
HOW_TO_RECEIVE_WEBHOOKS = (
    "STRIPE_WEBHOOK_SECRET is not set: tallystick webhooks setup --url https://…/webhooks/stripe prints it once, and"
    " Stripe's Dashboard shows that of an endpoint which is there already"
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")

# What a DATABASE_URL may ask for behind its `?`, as PostgreSQL's own programs name it.
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SSL_FILES = ("sslrootcert", "sslcert", "sslkey")
# Others would choose a standby, which takes no writes.
SESSION_ATTRIBUTES = ("any", "primary", "read-write")
# We set the first two ourselves. The last the driver does not know, and to leave it out takes no encryption away.
LEFT_OUT = ("connect_timeout", "application_name", "channel_binding")
DATABASE_PARAMETERS = ("sslmode", *SSL_FILES, "target_session_attrs", "host", "port", *LEFT_OUT)

PERCENT_ENCODING = "in a password, write @ as %40, : as %3A, / as %2F and % as %25"

# No symmetric one is among them: whoever had a public key could sign with it as if it were a shared secret.
JwtAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
# RFC 7518, 3.2: a key for HS256 has at least as many bits as its hash.
MIN_JWT_SECRET_BYTES = 32


class Settings(BaseSettings):
    """Everything that can be set, with its unit in its name. `docs/configuration.md` explains each one."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True)

    database_url: str = Field(validation_alias="DATABASE_URL")
    redis_url: str = Field(validation_alias="REDIS_URL")
    stripe_api_key: SecretStr = Field(validation_alias="STRIPE_API_KEY")
    stripe_webhook_secret: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), validation_alias="STRIPE_WEBHOOK_SECRET"
    )
    stripe_api_base: str = Field(default="https://api.stripe.com", validation_alias="STRIPE_API_BASE")
    stripe_meter_events_base: str | None = Field(default=None, validation_alias="STRIPE_METER_EVENTS_BASE")

    host: str = Field(default="127.0.0.1", validation_alias="TALLYSTICK_HOST")
    port: int = Field(default=8080, ge=0, le=65535, validation_alias="TALLYSTICK_PORT")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", validation_alias="TALLYSTICK_LOG_LEVEL"
    )

    otel_endpoint: str | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")

    rules_file: Path | None = Field(default=None, validation_alias="TALLYSTICK_RULES_FILE")
    worker_metrics_port: int = Field(default=0, ge=0, le=65535, validation_alias="TALLYSTICK_WORKER_METRICS_PORT")

    database_pool_size: int = Field(default=10, ge=1, le=200, validation_alias="TALLYSTICK_DATABASE_POOL_SIZE")
    stripe_timeout_seconds: int = Field(default=20, ge=1, le=80, validation_alias="TALLYSTICK_STRIPE_TIMEOUT_SECONDS")
    stripe_calls_per_second: int = Field(
        default=80, ge=1, le=10_000, validation_alias="TALLYSTICK_STRIPE_CALLS_PER_SECOND"
    )
    stripe_stream_events_per_second: int = Field(
        default=5000, ge=1, le=100_000, validation_alias="TALLYSTICK_STRIPE_STREAM_EVENTS_PER_SECOND"
    )

    webhook_tolerance_seconds: int = Field(
        default=300, ge=1, le=3600, validation_alias="TALLYSTICK_WEBHOOK_TOLERANCE_SECONDS"
    )
    customer_reference_key: str = Field(
        default="tallystick_ref", min_length=1, max_length=40, validation_alias="TALLYSTICK_CUSTOMER_REFERENCE_KEY"
    )

    timeline_retention_days: int = Field(
        default=400, ge=1, le=3660, validation_alias="TALLYSTICK_TIMELINE_RETENTION_DAYS"
    )
    event_retention_days: int = Field(default=400, ge=60, le=3660, validation_alias="TALLYSTICK_EVENT_RETENTION_DAYS")

    sender: Literal["meter_events", "meter_event_stream"] = Field(
        default="meter_events", validation_alias="TALLYSTICK_SENDER"
    )
    usage_dedupe_hours: int = Field(default=72, ge=24, le=840, validation_alias="TALLYSTICK_USAGE_DEDUPE_HOURS")
    usage_buffer_max_bytes: int = Field(
        default=256 * 1024 * 1024, ge=1024 * 1024, validation_alias="TALLYSTICK_USAGE_BUFFER_MAX_BYTES"
    )
    usage_sync_replicas: int = Field(default=0, ge=0, le=10, validation_alias="TALLYSTICK_USAGE_SYNC_REPLICAS")
    usage_retention_days: int = Field(default=400, ge=40, le=3660, validation_alias="TALLYSTICK_USAGE_RETENTION_DAYS")
    seal_every_seconds: int = Field(default=3600, ge=1, le=86_400, validation_alias="TALLYSTICK_SEAL_EVERY_SECONDS")
    seal_threshold: Decimal | None = Field(default=None, gt=0, validation_alias="TALLYSTICK_SEAL_THRESHOLD")
    hold_without_subscription_hours: int = Field(
        default=24, ge=0, le=720, validation_alias="TALLYSTICK_HOLD_WITHOUT_SUBSCRIPTION_HOURS"
    )

    portal_return_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), validation_alias="TALLYSTICK_PORTAL_RETURN_ORIGINS"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(default=(), validation_alias="TALLYSTICK_CORS_ORIGINS")
    jwt_jwks_url: str | None = Field(default=None, validation_alias="TALLYSTICK_JWT_JWKS_URL")
    jwt_secret: SecretStr | None = Field(default=None, validation_alias="TALLYSTICK_JWT_SECRET")
    jwt_issuer: str | None = Field(default=None, validation_alias="TALLYSTICK_JWT_ISSUER")
    jwt_audience: str | None = Field(default=None, validation_alias="TALLYSTICK_JWT_AUDIENCE")
    jwt_algorithms: Annotated[tuple[JwtAlgorithm, ...], NoDecode] = Field(
        default=("RS256", "ES256"), min_length=1, validation_alias="TALLYSTICK_JWT_ALGORITHMS"
    )
    jwt_customer_claim: str = Field(default="sub", min_length=1, validation_alias="TALLYSTICK_JWT_CUSTOMER_CLAIM")

    @field_validator("stripe_webhook_secret", mode="before")
    @classmethod
    def _split_secrets(cls, value: object) -> object:
        """Several secrets, comma-separated, may be valid at once while one is being rolled."""
        secrets = _split(value)
        if value and not secrets:
            raise ValueError("there is no secret in it")
        return secrets

    @field_validator("portal_return_origins", "cors_origins", "jwt_algorithms", mode="before")
    @classmethod
    def _split_lists(cls, value: object) -> object:
        return _split(value)

    @field_validator("stripe_webhook_secret")
    @classmethod
    def _secrets_look_right(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        # An empty key is a valid HMAC key: whoever signs with it would be believed.
        if any(len(secret.get_secret_value()) < 8 for secret in secrets):
            raise ValueError("each secret must have at least 8 characters, as in whsec_…")
        return secrets

    @field_validator("portal_return_origins", "cors_origins")
    @classmethod
    def _origins_are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        normal = tuple(origin.removesuffix("/").lower() for origin in origins)
        for origin in normal:
            if not ORIGIN.fullmatch(origin):
                raise ValueError("each must be an origin such as https://app.example.com, and nothing after it")
            if (origin.partition(":")[0], origin.rpartition(":")[2]) in (("https", "443"), ("http", "80")):
                raise ValueError("leave out the default port, as browsers do")
        return normal

    @field_validator("jwt_jwks_url")
    @classmethod
    def _keys_come_safely(cls, url: str | None) -> str | None:
        # Whoever can change these keys on their way can sign as anybody.
        if url is not None:
            parts = urlsplit(url)
            if not parts.hostname or "@" in parts.netloc or parts.scheme not in ("https", "http"):
                raise ValueError("must begin with https:// and a host")
            if parts.scheme == "http" and parts.hostname not in LOOPBACK:
                raise ValueError("must begin with https://, except on this machine itself")
        return url

    @field_validator("jwt_secret")
    @classmethod
    def _secret_is_long_enough(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and len(secret.get_secret_value().encode()) < MIN_JWT_SECRET_BYTES:
            raise ValueError(f"must have at least {MIN_JWT_SECRET_BYTES} bytes")
        return secret

    @model_validator(mode="after")
    def _tokens_can_be_checked(self) -> Self:
        if self.jwt_jwks_url is None and self.jwt_secret is None:
            return self
        if self.jwt_jwks_url is not None and self.jwt_secret is not None:
            raise ValueError("TALLYSTICK_JWT_JWKS_URL and TALLYSTICK_JWT_SECRET are both set: choose one")
        for name, value in (("ISSUER", self.jwt_issuer), ("AUDIENCE", self.jwt_audience)):
            if value is None:
                raise ValueError(f"TALLYSTICK_JWT_{name} is not set, and tokens cannot be checked without it")
        return self

    @field_validator("database_url")
    @classmethod
    def _database_is_postgres(cls, url: str) -> str:
        return driver_url(url)

    @field_validator("redis_url")
    @classmethod
    def _redis_is_redis(cls, url: str) -> str:
        if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        try:
            _ = urlsplit(url).port
        except ValueError:  # its text has what may be a part of the password
            raise ValueError(f"must be as redis://user:password@host:6379/0; {PERCENT_ENCODING}") from None
        return url

    @field_validator("stripe_api_base", "stripe_meter_events_base", "otel_endpoint")
    @classmethod
    def _base_is_url(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("must begin with http:// or https://")
        return url.rstrip("/") if url else None

    @property
    def livemode(self) -> bool:
        """Whether the API key is a live one; events of the other mode are refused."""
        return "_live_" in self.stripe_api_key.get_secret_value()


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def driver_url(url: str) -> str:
    """PostgreSQL's URL as SQLAlchemy and the driver take it: TLS has other names there than at PostgreSQL's programs.

    Raises `ValueError` for what cannot be read or is not known; its text repeats no password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ValueError("must begin with postgresql://")
    try:
        read = make_url(f"postgresql+asyncpg://{rest}")
    except (ArgumentError, ValueError):
        raise ValueError(f"must be as postgresql://user:password@host:5432/name; {PERCENT_ENCODING}") from None
    # Of what is named twice the last counts, as in PostgreSQL's own programs.
    given = {name: value if isinstance(value, str) else value[-1] for name, value in read.query.items()}
    if "ssl" in given:  # the driver's own name
        given["sslmode"] = given.pop("ssl")
    if unknown := [name for name in given if name not in DATABASE_PARAMETERS]:
        raise ValueError(f"the parameter {unknown[0]!a} is not known; there are: {', '.join(DATABASE_PARAMETERS)}")
    for name, allowed in (("sslmode", SSL_MODES), ("target_session_attrs", SESSION_ATTRIBUTES)):
        if name in given and given[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}")
    query = {name: value for name, value in read.query.items() if name in ("host", "port", "target_session_attrs")}
    tls = {name: given[name] for name in ("sslmode", *SSL_FILES) if name in given}
    for name in tls.keys() & set(SSL_FILES):
        tls[name] = _find_file(name, tls[name])
    if tls:  # the driver takes the files only in a URL of its own, which SQLAlchemy hands over beside all else
        query["dsn"] = f"postgresql://?{urlencode(tls)}"
    return read.set(query=query).render_as_string(hide_password=False)


def _find_file(name: str, path: str) -> str:
    if (name, path) == ("sslrootcert", "system"):  # the certificates that this machine trusts
        path = ssl.get_default_verify_paths().cafile or path
    if not Path(path).is_file():
        raise ValueError(f"{name}: there is no file {path!a}")
    return path


def load_settings(*, to_serve: bool = False) -> Settings:
    """Read the environment; `to_serve` for a process that receives webhooks, which are signed with a secret.

    Raises `SettingsError` whose one line names every variable that is missing or wrong.
    """
    if misspelt := "; ".join(_find_misspelt()):
        raise SettingsError(misspelt)
    try:
        settings = Settings()  # type: ignore[call-arg]  # the values come from the environment
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem) for problem in error.errors(include_input=False))) from None
    if to_serve and not settings.stripe_webhook_secret:
        raise SettingsError(HOW_TO_RECEIVE_WEBHOOKS)
    return settings


def _find_misspelt() -> Iterator[str]:
    """Variables that are nearly a setting's. Others may be anybody's own, or Kubernetes's for a service of our name."""
    known = [*(str(field.validation_alias) for field in Settings.model_fields.values()), *OF_RUN]
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known and os.environ[name]:
            for meant in get_close_matches(name.upper(), known, n=1, cutoff=ALIKE):
                yield f"{name} is no setting; did you mean {meant}?"


def _explain(problem: object) -> str:
    assert isinstance(problem, dict)
    if not problem["loc"]:  # it is about several variables, and names them
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"{name} is not set"
    return f"{name}: {str(problem['msg']).removeprefix('Value error, ')}"
