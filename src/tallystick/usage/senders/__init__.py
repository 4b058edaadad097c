"""How a delivery is told to Stripe. Each sender makes one call and translates its end into an `Outcome`."""
