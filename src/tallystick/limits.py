"""How often one caller may come, counted in this process and nowhere else: no other part is asked."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

SECOND = timedelta(seconds=1)
# More callers than any installation has; beyond it those that have come to rest are forgotten.
MAX_REMEMBERED = 10_000


@dataclass
class Limiter:
    """For each caller the time until which what he has used is paid off (the generic cell rate algorithm).

    A caller at rest may send a whole second's worth at once, and goes on at his rate after that.
    """

    busy_until: dict[str, datetime] = field(default_factory=dict)

    def admit(self, caller: str, per_second: int, now: datetime) -> bool:
        """Whether this call is within the limit; one that is not costs the caller nothing."""
        # Nobody is ever busy for more than a second: what says so was written before the clock was set back.
        busy_until = self.busy_until.get(caller, now)
        begins = now if busy_until > now + SECOND else max(busy_until, now)
        ends = begins + SECOND / per_second
        if ends > now + SECOND:
            return False
        if len(self.busy_until) >= MAX_REMEMBERED and caller not in self.busy_until:
            self.busy_until = {known: until for known, until in self.busy_until.items() if until > now}
        self.busy_until[caller] = ends
        return True
