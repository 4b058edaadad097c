"""What a benchmark found: its rounds, those of its yardstick, and whether what it is to reach was reached."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table


class CheckFailed(Exception):
    """What a benchmark wrote is not all there, or not once."""


@dataclass
class Side:
    """One side of a comparison: the rate of each round, and what all rounds together used."""

    name: str
    unit: str
    rates: list[float] = field(default_factory=list)
    latencies: list[int] = field(default_factory=list)  # nanoseconds
    cpu: dict[str, float] = field(default_factory=dict)  # seconds, by process
    seconds: float = 0

    @property
    def rate(self) -> float:
        return median(self.rates)

    def percentile_ms(self, percent: int) -> float:
        """A percentile of the latencies of all rounds, in milliseconds."""
        if len(self.latencies) < 2:
            return self.latencies[0] / 1e6 if self.latencies else 0.0
        return quantiles(self.latencies, n=100)[percent - 1] / 1e6

    def busy(self) -> dict[str, float]:
        """How many processors each process kept busy; those that did next to nothing are left out."""
        return {name: used / self.seconds for name, used in self.cpu.items() if used / self.seconds >= 0.01}

    def figures(self) -> dict[str, object]:
        """Everything by its name."""
        figures: dict[str, object] = {
            "side": self.name,
            "unit": self.unit,
            "median": round(self.rate, 1),
            "spread": [round(min(self.rates), 1), round(max(self.rates), 1)],
            "rounds": len(self.rates),
        }
        if self.latencies:
            figures |= {f"p{percent}_ms": round(self.percentile_ms(percent), 2) for percent in (50, 95, 99)}
        figures["processors_busy"] = {name: round(busy, 2) for name, busy in self.busy().items()}
        return figures


@dataclass(frozen=True)
class Target:
    """Something to reach, what was measured, and whether that is enough."""

    wanted: str
    measured: str
    reached: bool


@dataclass
class Report:
    """A benchmark's outcome: the flow at each of its sizes, its yardstick if it has one, and peers that do the same."""

    benchmark: str
    flows: list[Side]
    yardstick: Side | None
    targets: list[Target]
    checked: str
    facts: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # bytes
    peers: list[Side] = field(default_factory=list)

    @property
    def sides(self) -> list[Side]:
        """All that was measured."""
        return [*self.flows, *self.peers, *([] if self.yardstick is None else [self.yardstick])]

    @property
    def ratio(self) -> float | None:
        """The flow's median rate to the yardstick's, measured in the same run."""
        return self.flows[0].rate / self.yardstick.rate if self.yardstick is not None else None

    def figures(self) -> dict[str, object]:
        """The report as plain values, for JSON."""
        return {
            "benchmark": self.benchmark,
            "sides": [side.figures() for side in self.sides],
            "ratio": None if self.ratio is None else round(self.ratio, 3),
            "targets": [vars(target) for target in self.targets],
            "checked": self.checked,
            "facts": self.facts,
            "memory_mib": {name: round(used / 2**20, 1) for name, used in self.memory.items()},
        }


def at_least(wanted: float, measured: float, unit: str) -> Target:
    """Reached by that much or more."""
    return Target(f"at least {_number(wanted)} {unit}", _number(measured), measured >= wanted)


def below(wanted: float, measured: float, unit: str) -> Target:
    """Reached by less than that."""
    return Target(f"below {_number(wanted)} {unit}", _number(measured), measured < wanted)


def print_reports(reports: Sequence[Report], console: Console) -> None:
    """The tables: what was measured, what it is measured against, and the rest below it."""
    for report in reports:
        table = Table("", "median", "spread", "p50 ms", "p95 ms", "p99 ms", title=report.benchmark)
        for side in report.sides:
            times = [f"{side.percentile_ms(percent):.1f}" if side.latencies else "" for percent in (50, 95, 99)]
            spread = f"{_number(min(side.rates))} to {_number(max(side.rates))}"
            table.add_row(side.name, f"{_number(side.rate)} {side.unit}", spread, *times)
        console.print(table)
        for side in report.sides:
            busy = ", ".join(f"{name} {used:.2f}" for name, used in side.busy().items())
            console.print(f"  processors kept busy ({side.name}): {busy}", highlight=False)
        if report.ratio is not None:
            console.print(f"  ratio to the yardstick: {report.ratio:.2f}", highlight=False)
        for target in report.targets:
            word = "reached" if target.reached else "not reached"
            console.print(f"  {target.wanted}: {target.measured}, {word}", highlight=False)
        for name, fact in report.facts.items():
            console.print(f"  {name}: {fact}", highlight=False)
        memory = ", ".join(f"{name} {used / 2**20:.0f}" for name, used in report.memory.items())
        if memory:
            console.print(f"  memory, MiB: {memory}", highlight=False)
        console.print(f"  checked: {report.checked}\n", highlight=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
