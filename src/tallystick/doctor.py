"""The doctor: look at every part that is needed and say `ok`, or how to mend it. It changes nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import text

from tallystick import db, schema
from tallystick.config import HOW_TO_RECEIVE_WEBHOOKS, Settings, load_settings
from tallystick.errors import SettingsError
from tallystick.findings import Finding, bad, brief, good, minute, notable
from tallystick.loops import read_last_done
from tallystick.mirror.marks import NEVER
from tallystick.notifications.addresses import AddressRefused, resolve
from tallystick.redis_client import REDIS_ERRORS
from tallystick.resources import Resources, open_resources
from tallystick.rules import NotificationEndpoint, Rules, load_rules
from tallystick.stripe_gateway import STRIPE_ERRORS
from tallystick.stripe_limits import METER_EVENT_MAX_AGE
from tallystick.terminal import explain_failure
from tallystick.usage.buffer import measure_ids
from tallystick.usage.meters import list_unfit, meter_of
from tallystick.usage.query import find_unlinked
from tallystick.webhooks.endpoint_setup import is_ours, list_endpoints, problems_of
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.recovery import read_recovery
from tallystick.worker import LOOPS

OLDEST_POSTGRES = 14
# The first Valkey was made from this version of Redis.
OLDEST_REDIS = (7, 2)
# Webhook signatures are taken five minutes either way, and Stripe takes meter events five minutes ahead.
LARGEST_SKEW = timedelta(seconds=60)
# Room for a burst of usage while PostgreSQL is away.
FULLEST_REDIS = 0.8
# A loop notes its runs every ten seconds, and waits for half a minute after a failure.
LOOP_LATE_AFTER = timedelta(minutes=2)
CONNECT_SECONDS = 3
# Usage often comes before its customer is linked. Two weeks are left then to find out whose it is.
UNLINKED_FOR_AT_MOST = METER_EVENT_MAX_AGE - timedelta(weeks=2)
# The worker's loop runs each minute, and stays five minutes behind on purpose.
RECOVERED_WITHIN = timedelta(minutes=20)


async def examine(clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> list[Finding]:
    """Examine everything, in the order in which one would mend it. A part that cannot be asked is a finding too."""
    try:
        settings = load_settings()
    except SettingsError as error:
        return [bad("settings", f"{error}; see docs/configuration.md")]
    rules, finding = _examine_rules(settings)
    findings = [_examine_secret(settings), finding]
    # A rules file that is wrong has been found; it must not hide what else there is to find.
    settings = settings.model_copy(update={"rules_file": None})
    async with open_resources(settings, application_name="tallystick doctor") as resources:
        postgres = [finding async for finding in _examine_postgres(resources, clock)]
        findings += postgres
        findings += [finding async for finding in _examine_redis(resources, clock)]
        findings += [finding async for finding in _examine_stripe(resources, clock, rules)]
        if all(finding.good for finding in postgres[:2]):
            findings += [finding async for finding in _examine_events(resources, clock())]
            findings.append(await _examine_usage(resources, clock()))
        findings += [finding async for finding in _examine_worker(resources, clock())]
    findings += await asyncio.gather(*(_examine_receiver(endpoint) for endpoint in rules.notifications))
    return findings


def _examine_secret(settings: Settings) -> Finding:
    if not settings.stripe_webhook_secret:
        return bad("settings", HOW_TO_RECEIVE_WEBHOOKS)
    return good("settings", "all are there")


def _examine_rules(settings: Settings) -> tuple[Rules, Finding]:
    try:
        rules = load_rules(settings.rules_file)
    except SettingsError as error:
        return Rules(), bad("rules file", str(error))
    return rules, good("rules file", str(settings.rules_file or "none, so the defaults hold"))


def _examine_clock(whose: str, theirs: datetime, asked: datetime, answered: datetime) -> Finding:
    """Their clock stood at `theirs` some time between the question and the answer."""
    skew = max(asked - theirs, theirs - answered, timedelta(0))
    if skew > LARGEST_SKEW:
        return bad(
            f"{whose}'s clock",
            f"it differs from this machine's by {skew.total_seconds():.0f} s: run NTP on both; webhooks may be refused,"
            " and leases and grace periods end at wrong times",
        )
    return good(f"{whose}'s clock", "in step with this machine's")


# PostgreSQL


async def _examine_postgres(resources: Resources, clock: Callable[[], datetime]) -> AsyncIterator[Finding]:
    try:
        async with db.transaction(resources.engine) as connection:
            version = int(await connection.scalar(text("SELECT current_setting('server_version_num')")) or 0) // 10_000
            standby = await connection.scalar(text("SELECT pg_is_in_recovery()"))
            current = await schema.is_current(connection)
            settings = {
                name: await connection.scalar(text("SELECT current_setting(:name)"), {"name": name})
                for name in ("fsync", "synchronous_commit")
            }
            asked = clock()
            theirs = await connection.scalar(text("SELECT clock_timestamp()"))
            answered = clock()
    except db.STORAGE_ERRORS as error:
        yield bad("PostgreSQL", explain_failure(error).removeprefix("PostgreSQL: "))
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
    assert isinstance(theirs, datetime)
    yield _examine_clock("PostgreSQL", theirs, asked, answered)


# Redis


async def _examine_redis(resources: Resources, clock: Callable[[], datetime]) -> AsyncIterator[Finding]:
    try:
        info: Mapping[str, Any] = await resources.redis.info()
        asked = clock()
        seconds, microseconds = await resources.redis.time()
        answered = clock()
    except REDIS_ERRORS as error:
        problem = explain_failure(error).removeprefix("Redis: ")
        yield bad("Redis", f"{problem} (usage goes to PostgreSQL meanwhile)")
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
    yield _examine_memory(info, resources.settings.usage_buffer_max_bytes)
    yield await _examine_ids(resources)
    yield _examine_clock(
        "Redis", datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds), asked, answered
    )


def _examine_memory(info: Mapping[str, Any], buffer_bytes: int) -> Finding:
    policy, most = info.get("maxmemory_policy", "noeviction"), int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0))
    if policy != "noeviction":
        return bad("Redis's memory", f"`maxmemory-policy` is {policy}: it must be noeviction, or waiting usage is lost")
    if most and most <= buffer_bytes:
        return bad(
            "Redis's memory",
            f"`maxmemory` is {_mib(most)}, no more than TALLYSTICK_USAGE_BUFFER_MAX_BYTES: raise the one, or lower the"
            " other, or ids find no room",
        )
    if most and used > FULLEST_REDIS * most:
        return bad("Redis's memory", f"{_mib(used)} of {_mib(most)} are in use: raise `maxmemory`")
    in_use = f"{_mib(used)} of {_mib(most)} are in use" if most else f"{_mib(used)} are in use; `maxmemory` is not set"
    return good("Redis's memory", f"{in_use}; nothing is evicted")


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


async def _examine_ids(resources: Resources) -> Finding:
    """What remembering the ids of usage events costs."""
    try:
        size, number = await measure_ids(resources.redis)
    except REDIS_ERRORS as error:
        return bad("usage ids", f"their memory cannot be measured ({brief(error)}); are SCAN and MEMORY allowed?")
    cost = f"about {round(size / number)} bytes each, measured" if number else "no ids yet"
    return good("usage ids", f"{cost}; remembered for at least {resources.settings.usage_dedupe_hours} h")


async def _examine_fsync(resources: Resources) -> Finding:
    try:
        appendfsync = (await resources.redis.config_get("appendfsync")).get("appendfsync")
    except REDIS_ERRORS:
        return good("Redis's disk", "appendonly yes; appendfsync cannot be read here, and should be always or everysec")
    if appendfsync == "no":
        return bad("Redis's disk", "`appendfsync` is no: set it to always or everysec, or answers wait in vain")
    return good("Redis's disk", f"appendonly yes, appendfsync {appendfsync}")


# Stripe


async def _examine_stripe(resources: Resources, clock: Callable[[], datetime], rules: Rules) -> AsyncIterator[Finding]:
    mode = "live" if resources.settings.livemode else "test"
    asked = clock()
    try:
        answer = await resources.stripe.raw_request_async("get", "/v1/events", limit=1)
    except STRIPE_ERRORS as error:
        if error.http_status in (401, 403):
            yield bad("Stripe", f"STRIPE_API_KEY is refused ({brief(error)}); a restricted key must read events")
        else:
            problem = explain_failure(error, stripe=resources.settings.stripe_api_base)
            yield bad("Stripe", problem.removeprefix("Stripe: "))
        return
    yield good("Stripe", f"the key works, in {mode} mode")
    yield _examine_stripes_clock(answer.headers.get("date"), asked, clock())
    try:
        endpoints = await list_endpoints(Reader(resources))
    except STRIPE_ERRORS as error:
        yield bad("webhook endpoint", f"it cannot be looked at ({brief(error)}); may the key read webhook endpoints?")
    else:
        for finding in _examine_endpoints(endpoints, mode):
            yield finding
    try:
        yield await _examine_meters(resources, rules)
    except STRIPE_ERRORS as error:
        yield bad("meters", f"they cannot be listed ({brief(error)}); may the key read billing meters?")
    try:
        yield await _examine_portal(resources, mode)
    except STRIPE_ERRORS as error:
        yield bad("portal", f"it cannot be looked at ({brief(error)}); may the key read portal configurations?")


def _examine_stripes_clock(date: str | None, asked: datetime, answered: datetime) -> Finding:
    if date is None:
        return good("Stripe's clock", "it was not told")
    # The header has whole seconds: Stripe's clock stood anywhere within that one.
    return _examine_clock("Stripe", parsedate_to_datetime(date), asked - timedelta(seconds=1), answered)


def _examine_endpoints(endpoints: list[dict[str, Any]], mode: str) -> list[Finding]:
    """One finding for each endpoint of ours: nobody can tell which of them is the one in use."""
    ours = [endpoint for endpoint in endpoints if is_ours(endpoint)]
    if not ours:
        return [
            bad("webhook endpoint", f"there is none in {mode} mode: tallystick webhooks setup --url …/webhooks/stripe")
        ]
    return [_examine_endpoint(endpoint) for endpoint in ours]


def _examine_endpoint(endpoint: Mapping[str, Any]) -> Finding:
    url = endpoint["url"]
    if problems := problems_of(endpoint):
        return bad(
            "webhook endpoint",
            f"{url}: {'; '.join(problems)}: tallystick webhooks setup --url {url}; if you no longer use it, delete it"
            " in Stripe's Dashboard",
        )
    # Stripe shows a secret only when it makes the endpoint.
    return good(
        "webhook endpoint",
        f"{url}; whether STRIPE_WEBHOOK_SECRET is its secret only a webhook can show: see"
        " tallystick_webhook_refused_total",
    )


async def _examine_meters(resources: Resources, rules: Rules) -> Finding:
    listed, cursor = await Reader(resources).page("/v1/billing/meters", None, status="active")
    while cursor is not None:
        page, cursor = await Reader(resources).page("/v1/billing/meters", cursor, status="active")
        listed += page
    meters = {meter.event_name: meter for meter in map(meter_of, listed)}
    unfit = list_unfit(meters, rules.meters)
    names = meters.keys() | {name for name, meter in rules.meters.items() if meter.sender == "usage_records"}
    usable = names - unfit.keys()
    if not usable:
        return bad("meters", " ".join(unfit.values()) or "there is none: make one at Stripe before usage is sent")
    # What the rules file asks for and does not get is a mistake; a meter that it does not name may be another's.
    finding = bad if unfit.keys() & rules.meters.keys() else good
    return finding("meters", " ".join([f"{len(usable)} can be used.", *unfit.values()]))


async def _examine_portal(resources: Resources, mode: str) -> Finding:
    """The settings of Stripe's customer portal (https://docs.stripe.com/api/customer_portal/configurations/list)."""
    page, _ = await Reader(resources).page("/v1/billing_portal/configurations", None, active="true", is_default="true")
    if not page:
        return bad(
            "portal",
            f"there is no default configuration in {mode} mode, so sessions must name one: save the settings of the"
            " customer portal in Stripe's Dashboard",
        )
    if not resources.settings.portal_return_origins:
        return good("portal", "it has a default configuration; TALLYSTICK_PORTAL_RETURN_ORIGINS allows no return_url")
    return good("portal", "it has a default configuration")


# What was received


async def _examine_events(resources: Resources, now: datetime) -> AsyncIterator[Finding]:
    state = await read_recovery(resources)
    if state.complete_until is None:
        yield bad("events", "Stripe's list was never read to its end: is a worker running? Or: tallystick recover")
    elif now - state.complete_until > RECOVERED_WITHIN:
        yield bad("events", f"complete only until {minute(state.complete_until)}: is a worker running?")
    elif state.gap_from is not None and state.gap_until is not None:
        lost = f"those from {minute(state.gap_from)} until {minute(state.gap_until)} are lost"
        yield bad("events", f"{lost}, for Stripe lists 30 days: tallystick sync")
    else:
        yield good("events", f"complete until {minute(state.complete_until)}")
    async with db.transaction(resources.engine) as connection:
        quarantined = await connection.scalar(
            text("SELECT count(*) FROM stripe_events WHERE verdict = 'quarantined'"),
        )
        syncing = await connection.scalar(text("SELECT started_at FROM mirror_sync WHERE finished_at IS NULL"))
        no_session = await connection.scalar(
            text("""
                SELECT reason FROM usage_deliveries
                 WHERE state = 'pending' AND sender = 'meter_event_stream' AND starts_with(reason, 'no_stream_session')
                 LIMIT 1
            """)
        )
    if quarantined:
        yield bad(
            "quarantine", f"{quarantined} events could not be handled: upgrade, then tallystick replay --quarantined"
        )
    else:
        yield good("quarantine", "empty")
    if syncing is not None:
        yield bad("sync", f"the one begun at {minute(syncing)} has not finished: tallystick sync goes on with it")
    if no_session is not None:
        live = "" if resources.settings.livemode else "it is for live mode only; "
        yield bad("meter event stream", f"Stripe gives no session ({no_session}): {live}use the sender meter_events")


async def _examine_usage(resources: Resources, now: datetime) -> Finding:
    async with db.transaction(resources.engine) as connection:
        unlinked = await find_unlinked(connection)
    if unlinked is None:
        return good("usage", "all of it belongs to customers")
    whose = "1 reference has" if unlinked.number == 1 else f"{unlinked.number} references have"
    finding = bad if unlinked.since < now - UNLINKED_FOR_AT_MOST else notable
    return finding(
        "usage",
        f"{whose} usage that belongs to no customer; the oldest, of {unlinked.oldest!a}, is from"
        f" {minute(unlinked.since)}, and Stripe takes it for {METER_EVENT_MAX_AGE.days} days: link each by PUT"
        " /v1/customers/{ref}; docs/operations.md, TallystickUsageUnlinked, lists them",
    )


# What runs beside it


async def _examine_worker(resources: Resources, now: datetime) -> AsyncIterator[Finding]:
    """Whether every loop ended a run well lately, on any worker. Said by Redis; that it is away was said before."""
    try:
        ended = await read_last_done(resources.redis)
    except REDIS_ERRORS:
        return
    late = [
        loop.name
        for loop in LOOPS
        if now - ended.get(loop.name, NEVER) > max(LOOP_LATE_AFTER, timedelta(seconds=3 * loop.every_seconds))
    ]
    if len(late) == len(LOOPS):
        yield bad("worker", "no loop has run lately: start `tallystick worker`")
    elif late:
        yield bad("worker", f"no run without an error lately of {', '.join(late)}: see `loop_failed` in its log")
    else:
        yield good("worker", f"all {len(LOOPS)} loops run")


async def _examine_receiver(endpoint: NotificationEndpoint) -> Finding:
    """Whether the receiver's address may be used and lets us connect. Nothing is sent: it might do something."""
    part, url = f"receiver {endpoint.name}", urlsplit(endpoint.url)
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            addresses = await resolve(host, port, allow_private_network=endpoint.allow_private_network)
            tls = url.scheme == "https"
            _, writer = await asyncio.open_connection(
                addresses[0], port, ssl=True if tls else None, server_hostname=host if tls else None
            )
    except AddressRefused as refused:
        return bad(part, f"{host} is at {refused}, inside a private network: see allow_private_network in its entry")
    except (OSError, TimeoutError) as error:
        return bad(part, f"{host}:{port} does not let us connect ({type(error).__name__}); notifications wait")
    writer.close()
    return good(part, f"{host}:{port} lets us connect")
