"""One process of the machine: `python -m tests.faults.part [--broken NAME] serve|worker|fake-stripe …`.

It is the product's own command line, with two additions: it ends when the harness dies, and it can be broken on
purpose before it starts (`breaking.py`), which the product itself has no switch for.
"""

import resource
import signal
import sys
from pathlib import Path

import uvicorn

from tallystick.dev.keeper import die_with_parent
from tests.faults.breaking import BREAKS

# As Stripe's first tries, then often enough that a run need not wait for hours for the last one.
WEBHOOK_RETRY_SECONDS = (0.1, 0.3, 1.0, 2.0, 4.0)
STOP_SECONDS = 2
# What some systems let a process open unless it asks for more.
OPEN_FILES = 256


def serve_fake_stripe(port: int, state: Path) -> None:
    from tallystick.dev.fake_stripe.app import create_fake_stripe

    uvicorn.run(
        create_fake_stripe(state, webhook_retry_seconds=WEBHOOK_RETRY_SECONDS, save_at_once=True),
        host="127.0.0.1",
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the harness's, which then stops us
    arguments = sys.argv[1:]
    if arguments[0] == "--broken":
        BREAKS[arguments[1]]()
        arguments = arguments[2:]
    if arguments[0] == "fake-stripe":
        serve_fake_stripe(int(arguments[1]), Path(arguments[2]))
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    from tallystick.cli import main as run

    sys.argv = ["tallystick", *arguments]
    run()


if __name__ == "__main__":
    main()
