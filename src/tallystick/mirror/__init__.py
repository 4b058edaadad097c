"""The mirror: what tallystick keeps of Stripe's objects, which is ids, links, status flags and times."""
