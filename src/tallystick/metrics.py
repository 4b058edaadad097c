"""The metrics of a process: counters of what it did, and gauges of the queues, which the worker measures."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

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

BUFFER_BYTES = Gauge("tallystick_buffer_bytes", "Usage waiting in Redis for the ledger, in bytes.", registry=REGISTRY)
UNSEALED_TOTALS = Gauge("tallystick_unsealed_totals", "Totals with usage not yet sealed.", registry=REGISTRY)
UNLINKED_TOTALS = Gauge(
    "tallystick_unlinked_totals",
    "Totals whose customer reference is not linked to a Stripe customer.",
    registry=REGISTRY,
)
DELIVERIES_BY_STATE = Gauge("tallystick_deliveries_by_state", "Deliveries, by state.", ["state"], registry=REGISTRY)
OLDEST_PENDING_SECONDS = Gauge(
    "tallystick_oldest_pending_delivery_seconds", "Age of the oldest delivery not yet sent.", registry=REGISTRY
)
CONSERVATION_DIFFERENCE = Gauge(
    "tallystick_conservation_difference",
    "Quantity in the ledger minus quantity in all named states; anything but 0 is a bug.",
    registry=REGISTRY,
)
EVENTS_QUARANTINED = Gauge("tallystick_events_quarantined", "Stripe events in quarantine.", registry=REGISTRY)
USAGE_CONFLICTS = Gauge(
    "tallystick_usage_conflicts", "Accepted events whose id the ledger held with another body.", registry=REGISTRY
)
NOTIFICATIONS_BY_STATE = Gauge(
    "tallystick_notifications_by_state", "Notifications, once an endpoint: waiting, dead.", ["state"], registry=REGISTRY
)
OLDEST_NOTIFICATION_SECONDS = Gauge(
    "tallystick_oldest_waiting_notification_seconds", "Age of the oldest notification not yet told.", registry=REGISTRY
)
