"""`scripts/audit.py` against a database of advisories of our own."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.serving import serve

VULNERABLE = ("pyjwt", "1.0.0")


@pytest.fixture
async def database() -> AsyncIterator[str]:
    async def answer(request: Request) -> Response:
        asked = [(query["package"]["name"], query["version"]) for query in json.loads(await request.body())["queries"]]
        return JSONResponse({"results": [{"vulns": [{"id": "X-1"}]} if one == VULNERABLE else {} for one in asked]})

    async def fail(request: Request) -> Response:
        return Response("{}" if request.url.path == "/strange" else "", 200 if request.url.path == "/strange" else 503)

    routes = [
        Route("/query", answer, methods=["POST"]),
        Route("/broken", fail, methods=["POST"]),
        Route("/strange", fail, methods=["POST"]),
    ]
    async with serve(Starlette(routes=routes)) as url:
        yield url


async def audit(project_root: Path, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(project_root / "scripts" / "audit.py"), *arguments), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def test_what_is_pinned_is_asked_for_and_advisories_fail_the_run(
    project_root: Path, database: str, tmp_path: Path
) -> None:
    pins = (project_root / "requirements" / "dev.txt").read_text()
    code, said = await audit(project_root, "--database", f"{database}/query")
    number = len(re.findall(r"^[a-z0-9._-]+==", pins, re.MULTILINE))
    assert (code, said) == (0, f"audit: {number} pins, 0 with advisories.\n")
    changed = tmp_path / "dev.txt"
    changed.write_text(f"{pins}{'=='.join(VULNERABLE)} ; python_version < '4' \\\n    --hash=sha256:0\n")
    code, said = await audit(project_root, "--database", f"{database}/query", "--pins", str(changed))
    assert code == 1
    assert said.startswith("pyjwt 1.0.0: X-1\n")


@pytest.mark.parametrize(
    ("entry", "code", "said"),
    [
        ('id = "X-1"\nreason = "not used here"\nuntil = 9999-12-31', 0, "audit: 1 pins, 0 with advisories.\n"),
        ('id = "X-1"\nreason = "not used here"\nuntil = 2020-01-01', 1, "pyjwt 1.0.0: X-1\n"),
        ('id = "X-2"\nreason = "not used here"\nuntil = 9999-12-31', 1, "pyjwt 1.0.0: X-1\n"),
        ('id = "X-1"\nreason = " "\nuntil = 9999-12-31', 1, "audit: accepted.toml: an entry needs id, reason"),
        ('id = "X-1"\nreason = "for ever"', 1, "audit: accepted.toml: an entry needs id, reason"),
    ],
    ids=["accepted", "expired", "another", "no reason", "no day"],
)
async def test_an_advisory_is_accepted_by_name_with_a_reason_and_until_a_day(
    project_root: Path, database: str, tmp_path: Path, entry: str, code: int, said: str
) -> None:
    pins, accepted = tmp_path / "dev.txt", tmp_path / "accepted.toml"
    pins.write_text("==".join(VULNERABLE) + "\n")
    accepted.write_text(f"[[accepted]]\n{entry}\n")
    ended = await audit(
        project_root, "--database", f"{database}/query", "--pins", str(pins), "--accepted", str(accepted)
    )
    assert ended[0] == code
    assert ended[1].startswith(said)


async def test_a_database_that_cannot_be_read_is_said_aloud_and_stops_nobody(project_root: Path, database: str) -> None:
    for address in ("http://127.0.0.1:1/query", f"{database}/broken", f"{database}/strange"):
        code, said = await audit(project_root, "--database", address)
        assert code == 0
        assert said.startswith("audit SKIPPED: the database of advisories cannot be read (")
        assert said.count("\n") == 1


def test_the_whole_check_begins_with_it(project_root: Path) -> None:
    assert "check python scripts/audit.py\n" in (project_root / "scripts" / "test").read_text()
