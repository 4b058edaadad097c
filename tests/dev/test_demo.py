"""The main job from end to end, on real processes: invariants I1 to I3, and access at every step."""

import json
import subprocess
import sys

import pytest


# It takes half a minute on a machine of its own, and the suite does not give it one.
@pytest.mark.timeout(240)
def test_the_month_ends_with_equal_halves_and_right_access() -> None:
    played = subprocess.run(
        [sys.executable, "-m", "tallystick", "demo", "--seed", "7", "--customers", "4", "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert played.returncode == 0, played.stderr[-2000:]
    report = json.loads(played.stdout)
    assert report["good"]
    assert report["conserved"]
    assert report["repeats"] > 0
    assert report["webhook_repeats"] > 0
    assert [customer["access"] for customer in report["customers"]] == [
        ["active", "active", "active"],
        ["active", "active", "active"],
        ["active", "restricted", "active"],
        ["active", "active", "active"],
    ]
    for customer in report["customers"]:
        assert customer["accepted"] == customer["ledger"] == customer["invoiced"]
