"""Stripe's resources, one module for each family: its calls, and how its objects look on the wire."""
