"""The metrics of a process: counters of what it did, and gauges of the queues, which the worker measures."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from tallystick import __version__

REGISTRY = CollectorRegistry()

BUILD = Info("tallystick_build", "Which release this is.", registry=REGISTRY)
BUILD.info({"version": __version__})

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

HTTP_REQUEST_SECONDS = Histogram(
    "tallystick_http_request_seconds",
    "Requests by the template of their route and the class of their answer: 2xx, 4xx, 5xx, none (hung up before).",
    ["method", "route", "status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
    registry=REGISTRY,
)
DATABASE_CONNECTIONS = Gauge(
    "tallystick_database_connections", "Connections to PostgreSQL that are in use.", registry=REGISTRY
)
DATABASE_POOL_SIZE = Gauge(
    "tallystick_database_pool_size", "Connections to PostgreSQL that this process may use.", registry=REGISTRY
)

WEBHOOK_EVENTS = Counter("tallystick_webhook_events", "Stripe events, by verdict.", ["verdict"], registry=REGISTRY)
WEBHOOK_REFUSED = Counter(
    "tallystick_webhook_refused", "Webhooks answered 4xx or 5xx, by reason.", ["reason"], registry=REGISTRY
)
WEBHOOK_SECRETS = Counter(
    "tallystick_webhook_secrets",
    "Signatures that were verified, by endpoint and secret: the first 8 hexadecimal digits of the secret's SHA-256.",
    ["endpoint", "secret"],
    registry=REGISTRY,
)
WEBHOOK_BATCH_SIZE = Histogram(
    "tallystick_webhook_batch_size",
    "Stripe events committed together.",
    buckets=(1, 2, 4, 8, 16, 32, 64),
    registry=REGISTRY,
)
WEBHOOKS_WAITING = Gauge(
    "tallystick_webhooks_waiting", "Verified Stripe events of this process that wait for a commit.", registry=REGISTRY
)
OLDEST_WEBHOOK_SECONDS = Gauge(
    "tallystick_oldest_waiting_webhook_seconds", "For how long the oldest of them has waited.", registry=REGISTRY
)
WEBHOOK_SECONDS = Histogram(
    "tallystick_webhook_seconds", "From a verified webhook to its commit.", buckets=_SECONDS, registry=REGISTRY
)

EVENTS_RECOVERED = Counter(
    "tallystick_events_recovered",
    "Stripe events that were found in Stripe's list before a webhook brought them. Some are usual; many mean that"
    " webhooks do not arrive.",
    registry=REGISTRY,
)
EVENTS_COMPLETE_UNTIL = Gauge(
    "tallystick_events_complete_until_seconds",
    "Unix time until which every handled event of Stripe's is recorded.",
    registry=REGISTRY,
)
EVENTS_GAP_SECONDS = Gauge(
    "tallystick_events_gap_seconds",
    "Length of the time whose events Stripe no longer listed when they were looked for; `tallystick sync` mends it.",
    registry=REGISTRY,
)

USAGE_EVENTS = Counter(
    "tallystick_usage_events",
    "Usage events received: accepted, duplicate, conflict or rejected.",
    ["result"],
    registry=REGISTRY,
)
USAGE_PATH = Counter(
    "tallystick_usage_requests",
    "Usage requests answered 202, by the store that holds them: buffer (Redis) or ledger (PostgreSQL, directly).",
    ["path"],
    registry=REGISTRY,
)
LEDGER_EVENTS = Counter(
    "tallystick_ledger_events",
    "Usage events offered to the ledger: recorded, duplicate or conflict.",
    ["result"],
    registry=REGISTRY,
)
DELIVERIES = Counter(
    "tallystick_deliveries", "Tries to tell Stripe, by outcome: sent, retry, parked.", ["outcome"], registry=REGISTRY
)
NOTIFICATION_TRIES = Counter(
    "tallystick_notification_tries",
    "Tries to tell an endpoint, by outcome: delivered, retry, dead.",
    ["endpoint", "outcome"],
    registry=REGISTRY,
)
LOOP_RUNS = Counter("tallystick_loop_runs", "Runs of a background loop.", ["loop", "outcome"], registry=REGISTRY)
LOOP_LAST_DONE = Gauge(
    "tallystick_loop_last_done_seconds",
    "Unix time at which a loop's last run ended without an error.",
    ["loop"],
    registry=REGISTRY,
)

QUEUE_LENGTH = Gauge(
    "tallystick_queue_length", "How much waits in a queue; docs/operations.md names them.", ["queue"], registry=REGISTRY
)
QUEUE_OLDEST_SECONDS = Gauge(
    "tallystick_queue_oldest_seconds",
    "For how long the oldest of it has waited; 0 if none.",
    ["queue"],
    registry=REGISTRY,
)
BUFFER_BYTES = Gauge("tallystick_buffer_bytes", "Usage waiting in Redis for the ledger, in bytes.", registry=REGISTRY)
BUFFER_LIMIT_BYTES = Gauge("tallystick_buffer_limit_bytes", "Above this, new usage is answered 429.", registry=REGISTRY)
DELIVERIES_BY_STATE = Gauge(
    "tallystick_deliveries_by_state",
    "Deliveries that are not at their end: pending, sending, sent (and not confirmed), parked.",
    ["state"],
    registry=REGISTRY,
)
DATABASE_RESTORED = Counter(
    "tallystick_database_restored",
    "How often PostgreSQL was found to be older than what Redis remembers, and the ids in Redis were forgotten.",
    registry=REGISTRY,
)
OVERDUE_PARTITIONS = Gauge(
    "tallystick_overdue_partitions",
    "Days of usage events that are past the retention and could not be dropped yet; each hour it is tried again.",
    registry=REGISTRY,
)
CONSERVATION_DIFFERENCE = Gauge(
    "tallystick_conservation_difference",
    "Quantity in the ledger minus quantity in all named states; anything but 0 is a bug.",
    registry=REGISTRY,
)
DRIFTS_OPEN = Gauge(
    "tallystick_usage_drifts_open",
    "Hours of a customer's meter in which Stripe's summary says something else than what was sent.",
    registry=REGISTRY,
)
UNCONFIRMED_DELIVERIES = Gauge(
    "tallystick_unconfirmed_deliveries",
    "Deliveries that Stripe took more than 24 hours ago and that its summaries do not show.",
    registry=REGISTRY,
)
UNBILLED_EVENTS = Gauge(
    "tallystick_unbilled_events",
    "Usage events of billing periods that have ended, which Stripe was not told yet.",
    registry=REGISTRY,
)
LATE_USAGE_EVENTS = Gauge(
    "tallystick_late_usage_events",
    "Usage events that came too late for their invoice: parked, carried into the next period, or taken by Stripe"
    " after the invoice was final.",
    ["kind"],
    registry=REGISTRY,
)
NOTIFICATIONS_BY_STATE = Gauge(
    "tallystick_notifications_by_state", "Notifications, once an endpoint: waiting, dead.", ["state"], registry=REGISTRY
)
OLDEST_NOTIFICATION_SECONDS = Gauge(
    "tallystick_oldest_waiting_notification_seconds", "Age of the oldest notification not yet told.", registry=REGISTRY
)
