"""A short run of the harness; `python -m tests.faults` makes the long ones."""

import json
from itertools import islice
from pathlib import Path

import pytest

from tests.faults.run import run_faults
from tests.faults.schedule import KINDS, draw, draw_short


@pytest.mark.timeout(180)
async def test_whatever_is_killed_cut_or_filled_everything_accepted_is_billed_once(tmp_path: Path) -> None:
    result = await run_faults(tmp_path, draw_short(11), seconds=60, seed=11, hurry=True)

    report = json.dumps(result.as_json(), indent=1)
    assert result.holds, report
    assert result.injector.injected.keys() == KINDS.keys() - {"long-sleep"}, report
    assert result.findings.accepted > 500, report
    assert result.book.retries > 0, "no client noticed any fault"
    assert result.findings.webhooks_acknowledged == result.findings.webhooks_sent > 50, report


def test_a_seed_always_brings_the_same_faults_and_every_kind_of_them() -> None:
    first, again, other = (list(islice(draw(seed), 100)) for seed in (5, 5, 6))

    assert first == again != other
    assert {fault.kind for fault in first} == KINDS.keys()
