"""One Stripe account: everything that the fake Stripe is made of, passed to every function that works on it."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tallystick.dev.fake_stripe.agenda import Agenda
from tallystick.dev.fake_stripe.clock import Clock
from tallystick.dev.fake_stripe.faults import Faults
from tallystick.dev.fake_stripe.ids import Ids
from tallystick.dev.fake_stripe.ledger import Ledger
from tallystick.dev.fake_stripe.settings import Settings
from tallystick.dev.fake_stripe.state import State
from tallystick.dev.fake_stripe.webhooks import Deliveries


@dataclass(frozen=True)
class Call:
    """One request to the API, after its parameters were checked."""

    id: str
    method: str
    path: str
    arguments: dict[str, str]
    """The variable parts of the path, by name."""
    params: dict[str, Any]
    version: str
    token: str
    idempotency_key: str | None
    base_url: str


class Account:
    """The state, the clock and everything that acts on them. Used from one event loop only; not thread-safe."""

    def __init__(
        self, state_path: Path | None, seed: int, webhook_retry_seconds: tuple[float, ...], *, save_at_once: bool
    ) -> None:
        self.seed = seed
        self._save_at_once = save_at_once
        self.state = State(state_path)
        self.agenda = Agenda()
        self.deliveries = Deliveries(self, webhook_retry_seconds)
        self.cause: Call | None = None
        """The call that is being worked on; events name it. None while the clock acts."""
        self.base_url = "http://127.0.0.1:12111"
        """Where this server was last reached: links in objects begin with it."""
        self.start_anew()

    def start_anew(self, seed: int | None = None) -> None:
        """Empties everything but the file's name. Deliveries under way are dropped."""
        self.seed = self.seed if seed is None else seed
        self.state.clear()
        self.deliveries.clear()
        self.clock = Clock()
        self.ids = Ids(self.seed, {})
        self.settings = Settings()
        self.random = random.Random(self.seed)
        self.agenda.clear()
        self.ledger = Ledger()
        self.faults = Faults()
        self.settle_seconds = 10.0

    def open(self) -> None:
        """Reads the state file, if there is one, and takes up where it ends."""
        self.state.open()
        saved = self.state.get("_account", "account")
        if saved is not None:
            self.seed = saved["seed"]
            self.ids = Ids(self.seed, saved["counts"])
            self.settings.change(saved["settings"])
            self.clock.load(saved["clock"])
        for event in self.state.all("_meter_event"):
            self.ledger.add(event)

    def note(self) -> None:
        """Has the clock, the counts of ids and the settings saved with the next save."""
        self.state.put(
            {
                "object": "_account",
                "id": "account",
                "seed": self.seed,
                "counts": self.ids.counts,
                "settings": asdict(self.settings),
                "clock": self.clock.dump(),
            }
        )

    def keep_before_telling(self) -> None:
        """To be called before anything leaves: with `save_at_once` it then survives a kill."""
        if self._save_at_once:
            self.note()
            self.state.save()

    def now(self) -> int:
        """The account's time, in seconds since the Unix epoch."""
        return self.clock.now()
