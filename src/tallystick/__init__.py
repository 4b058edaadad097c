"""tallystick keeps the product's half of what Stripe holds: access, usage, and the proof that both halves agree."""

__version__ = "0.1.0"
