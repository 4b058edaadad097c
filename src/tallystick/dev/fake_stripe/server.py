"""Runs the fake Stripe as a server of its own."""

from __future__ import annotations

from pathlib import Path

import uvicorn

from tallystick.dev.fake_stripe.app import create_fake_stripe

# A held or slow connection must not keep the server from stopping.
STOP_SECONDS = 3


def serve_fake_stripe(host: str, port: int, state_path: Path | None, seed: int) -> None:
    """Serves until SIGINT (returns) or SIGTERM (ends by it), saving first. Raises SystemExit when the port is taken."""
    app = create_fake_stripe(state_path, seed)
    uvicorn.run(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS
    )
