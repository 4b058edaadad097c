"""What is for development and tests only: embedded PostgreSQL and Valkey, the fake Stripe, the demo."""
