"""Telling the product what changed: rows written with their cause, delivered as Standard Webhooks."""
