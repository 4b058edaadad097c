"""Stripe's events: received, translated, recorded; and objects fetched where events left a doubt."""
