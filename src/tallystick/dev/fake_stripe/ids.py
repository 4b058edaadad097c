"""Ids that look like Stripe's and repeat exactly for the same seed."""

from __future__ import annotations

import hashlib

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Stripe's short ids have 14 characters after the prefix, the others 24.
SHORT_PREFIXES = frozenset({"cus", "prod", "si", "req", "feat", "ent"})


class Ids:
    """Hands out ids. A count for each prefix keeps, say, invoices' ids the same however often something is listed."""

    def __init__(self, seed: int, counts: dict[str, int]) -> None:
        self.seed = seed
        self.counts = counts

    def new(self, prefix: str) -> str:
        """The next id with this prefix, such as `cus_8fK2…`."""
        count = self.counts.get(prefix, 0) + 1
        self.counts[prefix] = count
        number = int.from_bytes(hashlib.sha256(f"{self.seed}/{prefix}/{count}".encode()).digest()[:18])
        letters = []
        for _ in range(14 if prefix in SHORT_PREFIXES else 24):
            number, digit = divmod(number, 62)
            letters.append(ALPHABET[digit])
        return f"{prefix}_{''.join(letters)}"
