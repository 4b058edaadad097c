"""Stripe's limits as its documentation has them, and nothing else: margins stand where the reason for them does.

How many calls a second Stripe takes is no constant: it depends on the mode, and Stripe raises it on request. So that is
a setting (`TALLYSTICK_STRIPE_CALLS_PER_SECOND`, `TALLYSTICK_STRIPE_STREAM_EVENTS_PER_SECOND`). In live mode it is 1,000
meter events a second and 10,000 through the stream, and of other calls 100; in a sandbox 25 calls of any kind
(https://docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api, https://docs.stripe.com/rate-limits).

The fake Stripe (dev/) has its own numbers: with these it would agree to a mistake in here.
"""

from datetime import timedelta

# A meter event (https://docs.stripe.com/api/billing/meter-event/create): how far its timestamp may lie back or ahead,
# how many significant digits its value may have, and for how long at least a repeat of its identifier is recognised.
METER_EVENT_MAX_AGE = timedelta(days=35)
METER_EVENT_MAX_AHEAD = timedelta(minutes=5)
METER_EVENT_DIGITS = 15
IDENTIFIER_UNIQUE_FOR = timedelta(hours=24)

# From its receipt on (https://docs.stripe.com/api/billing/meter-event-adjustment/create).
METER_EVENT_CANCELLABLE_FOR = timedelta(hours=24)

# https://docs.stripe.com/api/v2/billing/meter-event-stream/create
STREAM_EVENTS_PER_REQUEST = 100

# Of an invoice line's `quantity_decimal`, as the SDK documents it.
INVOICE_LINE_DECIMALS = 12

# The invoice at a period's end (https://docs.stripe.com/billing/invoices/subscription, "about an hour"; up to 72 by a
# setting of the account).
INVOICE_DRAFT_AT_LEAST = timedelta(hours=1)

# Of any list (https://docs.stripe.com/api/pagination).
OBJECTS_PER_PAGE = 100

# https://docs.stripe.com/api/events/list, https://docs.stripe.com/api/v2/core/events/list
EVENTS_LISTED_FOR = timedelta(days=30)
EVENT_TYPES_PER_LIST = 20

# In live mode (https://docs.stripe.com/webhooks#retries).
WEBHOOKS_TRIED_FOR = timedelta(days=3)
