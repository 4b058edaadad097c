"""Asks the OSV database (https://osv.dev) whether an advisory names one of the pinned packages; scripts/test runs it.

One request with names and versions. Ends with 1 and the ids if there are advisories, and with 0 if there are none, or
if the database cannot be reached: then it says so in one line, for nobody should be kept from working by that.

An advisory without a fix is accepted by an entry in requirements/accepted-advisories.toml, with the reason and the day
until which it holds. After that day it fails the run again, so that somebody looks once more.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Collection
from datetime import UTC, date, datetime
from pathlib import Path

import httpx

DATABASE = "https://api.osv.dev/v1/querybatch"
ANSWER_WITHIN_SECONDS = 15
REQUIREMENTS = Path(__file__).parents[1] / "requirements"
PINS = REQUIREMENTS / "dev.txt"  # the other files hold a part of it
ACCEPTED = REQUIREMENTS / "accepted-advisories.toml"


def read_pins(text: str) -> list[tuple[str, str]]:
    """Name and version of each package; one that is pinned twice, for two platforms, comes twice."""
    return re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)


def read_accepted(text: str, today: date) -> set[str]:
    """The ids that are accepted today. Raises `ValueError` for an entry that lacks its id, its reason or its day."""
    accepted = set()
    for entry in tomllib.loads(text).get("accepted", []):
        id_, reason, until = entry.get("id"), entry.get("reason"), entry.get("until")
        if not (isinstance(id_, str) and isinstance(reason, str) and reason.strip() and type(until) is date):
            raise ValueError(f"an entry needs id, reason and until (a day): {entry}")
        if today <= until:
            accepted.add(id_)
    return accepted


def find_advisories(pins: list[tuple[str, str]], database: str, accepted: Collection[str] = ()) -> list[str]:
    """A line for each package with advisories that are not accepted.

    Raises `httpx.HTTPError` or `ValueError` when they cannot be read.
    """
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in pins]
    answer = httpx.post(database, json={"queries": queries}, timeout=ANSWER_WITHIN_SECONDS).raise_for_status().json()
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != len(pins):
        raise ValueError("its answer is not what was asked for")
    lines = []
    for (name, version), result in zip(pins, results, strict=True):
        ids = sorted({found["id"] for found in result.get("vulns") or ()} - set(accepted))
        if ids:
            lines.append(f"{name} {version}: {', '.join(ids)}")
    return lines


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description="Look for advisories about the pinned packages.")
    parser.add_argument("--pins", type=Path, default=PINS)
    parser.add_argument("--database", default=DATABASE, help="Another server that answers as OSV does.")
    parser.add_argument("--accepted", type=Path, default=ACCEPTED, help="The list of accepted advisories.")
    arguments = parser.parse_args()
    pins = read_pins(arguments.pins.read_text())
    try:
        accepted = read_accepted(arguments.accepted.read_text(), datetime.now(UTC).date())
    except ValueError as error:
        sys.stdout.write(f"audit: {arguments.accepted.name}: {error}\n")
        return 1
    try:
        found = find_advisories(pins, arguments.database, accepted)
    except (httpx.HTTPError, ValueError) as error:
        sys.stdout.write(f"audit SKIPPED: the database of advisories cannot be read ({type(error).__name__}).\n")
        return 0
    for line in found:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"audit: {len(pins)} pins, {len(found)} with advisories.\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
