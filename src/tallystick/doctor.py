"""The doctor: look at every part that is needed and say `ok`, or how to mend it. It changes nothing."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from sqlalchemy import text

from tallystick import db
from tallystick.config import Settings, load_settings
from tallystick.errors import SettingsError
from tallystick.redis_client import REDIS_ERRORS
from tallystick.resources import Resources, open_resources
from tallystick.rules import load_rules
from tallystick.stripe_gateway import STRIPE_ERRORS
from tallystick.usage.meters import Meter
from tallystick.webhooks.endpoint_setup import is_ours, list_endpoints, problems_of
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.recovery import read_recovery

OLDEST_POSTGRES = 14
# The first Valkey was made from this version of Redis.
OLDEST_REDIS = (7, 2)
# Webhook signatures are taken five minutes either way, and Stripe takes meter events five minutes ahead.
LARGEST_SKEW = timedelta(seconds=60)
# The worker's loop runs each minute, and stays five minutes behind on purpose.
RECOVERED_WITHIN = timedelta(minutes=20)


@dataclass(frozen=True)
class Finding:
    """What was found about one part. `text` says what it is when it is good, and how to mend it when it is not."""

    part: str
    good: bool
    text: str

    def as_json(self) -> dict[str, object]:
        return {"part": self.part, "ok": self.good, "text": self.text}


def good(part: str, text: str) -> Finding:
    """A part that is as it should be."""
    return Finding(part, good=True, text=text)


def bad(part: str, text: str) -> Finding:
    """A part to be mended."""
    return Finding(part, good=False, text=text)


async def examine(clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> list[Finding]:
    """Examine everything, in the order in which one would mend it. A part that cannot be asked is a finding too."""
    try:
        settings = load_settings()
    except SettingsError as error:
        return [bad("settings", f"{error}; see docs/configuration.md")]
    findings = [good("settings", "all are there"), _examine_rules(settings)]
    # A rules file that is wrong has been found; it must not hide what else there is to find.
    settings = settings.model_copy(update={"rules_file": None})
    async with open_resources(settings, application_name="tallystick doctor") as resources:
        postgres = [finding async for finding in _examine_postgres(resources)]
        findings += postgres
        findings += [finding async for finding in _examine_redis(resources)]
        findings += [finding async for finding in _examine_stripe(resources, clock)]
        if all(finding.good for finding in postgres[:2]):
            findings += [finding async for finding in _examine_events(resources, clock())]
    return findings


def _examine_rules(settings: Settings) -> Finding:
    try:
        load_rules(settings.rules_file)
    except SettingsError as error:
        return bad("rules file", str(error))
    return good("rules file", str(settings.rules_file or "none, so the defaults hold"))


# PostgreSQL


async def _examine_postgres(resources: Resources) -> AsyncIterator[Finding]:
    try:
        async with db.transaction(resources.engine) as connection:
            version = int(await connection.scalar(text("SELECT current_setting('server_version_num')")) or 0) // 10_000
            standby = await connection.scalar(text("SELECT pg_is_in_recovery()"))
            current = await db.schema_is_current(connection)
            settings = {
                name: await connection.scalar(text("SELECT current_setting(:name)"), {"name": name})
                for name in ("fsync", "synchronous_commit")
            }
    except db.STORAGE_ERRORS as error:
        yield bad("PostgreSQL", f"{_brief(error)}; is DATABASE_URL right, and the server up?")
        return
    if version < OLDEST_POSTGRES:
        yield bad("PostgreSQL", f"version {version} is too old; {OLDEST_POSTGRES} or later is needed")
    elif standby:
        yield bad("PostgreSQL", "it is a standby, which takes no writes: DATABASE_URL must name the primary")
    else:
        yield good("PostgreSQL", f"version {version}")
    if current:
        yield good("schema", "up to date")
    else:
        yield bad("schema", "migrations are missing, or are newer than this release: tallystick migrate")
    unsafe = {name: value for name, value in settings.items() if value == "off"}
    if unsafe:
        yield bad("PostgreSQL's disk", f"{' and '.join(unsafe)} must not be off: a crash would lose what was answered")
    else:
        yield good("PostgreSQL's disk", "commits are on disk before they are answered")


# Redis


async def _examine_redis(resources: Resources) -> AsyncIterator[Finding]:
    try:
        info: Mapping[str, Any] = await resources.redis.info()
    except REDIS_ERRORS as error:
        yield bad(
            "Redis", f"{_brief(error)}; is REDIS_URL right, and the server up? Usage goes to PostgreSQL meanwhile"
        )
        return
    name, version = ("Valkey", info["valkey_version"]) if "valkey_version" in info else ("Redis", info["redis_version"])
    if tuple(int(part) for part in str(version).split(".")[:2]) < OLDEST_REDIS:
        yield bad("Redis", f"{name} {version} is too old; Redis 7.2 or Valkey is needed")
    else:
        yield good("Redis", f"{name} {version}")
    if not info.get("aof_enabled"):
        yield bad("Redis's disk", "set `appendonly yes`: without it usage goes to PostgreSQL directly, and slower")
    else:
        yield await _examine_fsync(resources)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield bad("Redis's memory", f"`maxmemory-policy` is {policy}: it must be noeviction, or waiting usage is lost")
    else:
        yield good("Redis's memory", "nothing is evicted")


async def _examine_fsync(resources: Resources) -> Finding:
    try:
        appendfsync = (await resources.redis.config_get("appendfsync")).get("appendfsync")
    except REDIS_ERRORS:
        return good("Redis's disk", "appendonly yes; appendfsync cannot be read here, and should be always or everysec")
    if appendfsync == "no":
        return bad("Redis's disk", "`appendfsync` is no: set it to always or everysec, or answers wait in vain")
    return good("Redis's disk", f"appendonly yes, appendfsync {appendfsync}")


# Stripe


async def _examine_stripe(resources: Resources, clock: Callable[[], datetime]) -> AsyncIterator[Finding]:
    mode = "live" if resources.settings.livemode else "test"
    asked = clock()
    try:
        answer = await resources.stripe.raw_request_async("get", "/v1/events", limit=1)
    except STRIPE_ERRORS as error:
        if error.http_status in (401, 403):
            yield bad("Stripe", f"STRIPE_API_KEY is refused ({_brief(error)}); a restricted key must read events")
        else:
            yield bad("Stripe", f"{_brief(error)}; can {resources.settings.stripe_api_base} be reached from here?")
        return
    yield good("Stripe", f"the key works, in {mode} mode")
    yield _examine_clock(answer.headers.get("date"), asked, clock())
    try:
        yield _examine_endpoints(await list_endpoints(Reader(resources)), mode)
    except STRIPE_ERRORS as error:
        yield bad("webhook endpoint", f"it cannot be looked at ({_brief(error)}); may the key read webhook endpoints?")
    try:
        yield await _examine_meters(resources)
    except STRIPE_ERRORS as error:
        yield bad("meters", f"they cannot be listed ({_brief(error)}); may the key read billing meters?")


def _examine_clock(date: str | None, asked: datetime, answered: datetime) -> Finding:
    if date is None:
        return good("clock", "Stripe did not tell its time")
    # The header has whole seconds: Stripe's clock stood anywhere within that one.
    stripe = parsedate_to_datetime(date)
    skew = max(asked - stripe - timedelta(seconds=1), stripe - answered, timedelta(0))
    if skew > LARGEST_SKEW:
        return bad(
            "clock", f"it differs from Stripe's by {skew.total_seconds():.0f} s: webhooks may be refused; use NTP"
        )
    return good("clock", "in step with Stripe's")


def _examine_endpoints(endpoints: list[dict[str, Any]], mode: str) -> Finding:
    ours = [endpoint for endpoint in endpoints if is_ours(endpoint)]
    if not ours:
        return bad(
            "webhook endpoint", f"there is none in {mode} mode: tallystick webhooks setup --url …/webhooks/stripe"
        )
    best = min(ours, key=lambda endpoint: len(problems_of(endpoint)))
    if problems := problems_of(best):
        return bad("webhook endpoint", f"{'; '.join(problems)}: tallystick webhooks setup --url {best['url']}")
    return good("webhook endpoint", best["url"])


async def _examine_meters(resources: Resources) -> Finding:
    page, _ = await Reader(resources).page("/v1/billing/meters", None, status="active")
    refused = [reason for listed in page if (reason := _meter_of(listed).refusal()) is not None]
    usable = len(page) - len(refused)
    if not usable:
        return bad("meters", " ".join(refused) or "there is none: make one at Stripe before usage is sent")
    return good("meters", " ".join([f"{usable} can be used.", *refused]))


def _meter_of(listed: Mapping[str, Any]) -> Meter:
    return Meter(
        id=listed["id"],
        event_name=listed["event_name"],
        formula=listed["default_aggregation"]["formula"],
        customer_key=listed["customer_mapping"]["event_payload_key"],
        value_key=listed["value_settings"]["event_payload_key"],
        event_time_window=listed.get("event_time_window"),
        status=listed["status"],
    )


# What was received


async def _examine_events(resources: Resources, now: datetime) -> AsyncIterator[Finding]:
    state = await read_recovery(resources)
    if state.complete_until is None:
        yield bad("events", "Stripe's list was never read to its end: is a worker running? Or: tallystick recover")
    elif now - state.complete_until > RECOVERED_WITHIN:
        yield bad("events", f"complete only until {_minute(state.complete_until)}: is a worker running?")
    elif state.gap_from is not None and state.gap_until is not None:
        lost = f"those from {_minute(state.gap_from)} until {_minute(state.gap_until)} are lost"
        yield bad("events", f"{lost}, for Stripe lists 30 days: tallystick sync")
    else:
        yield good("events", f"complete until {_minute(state.complete_until)}")
    async with db.transaction(resources.engine) as connection:
        quarantined = await connection.scalar(
            text("SELECT count(*) FROM stripe_events WHERE verdict = 'quarantined'"),
        )
        syncing = await connection.scalar(text("SELECT started_at FROM mirror_sync WHERE finished_at IS NULL"))
    if quarantined:
        yield bad(
            "quarantine", f"{quarantined} events could not be handled: upgrade, then tallystick replay --quarantined"
        )
    else:
        yield good("quarantine", "empty")
    if syncing is not None:
        yield bad("sync", f"the one begun at {_minute(syncing)} has not finished: tallystick sync goes on with it")


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
