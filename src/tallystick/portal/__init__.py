"""The Customer Portal: a short-lived URL at which a customer mends his own payment details."""
