"""Usage: ingest → buffer → ledger → sealing → delivery, and the questions that can be asked of it."""
