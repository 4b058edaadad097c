"""Access: what a customer may use, decided from the mirror."""
