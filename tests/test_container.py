"""What can be known about the container files without an engine: their sources exist, and their commands are ours."""

import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from tallystick import loops
from tallystick.cli import ANSWER_WITHIN_SECONDS, app
from tallystick.config import Settings
from tallystick.resources import CLOSE_WITHIN_SECONDS
from tallystick.webhooks import inbox


@pytest.fixture(scope="module")
def dockerfile(project_root: Path) -> list[str]:
    """The instructions, one a line."""
    text = (project_root / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def compose(project_root: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((project_root / "compose.yaml").read_text())
    return parsed


def own_services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in compose["services"].items() if service["image"] == "tallystick"}


def command_names() -> set[str]:
    return set(getattr(get_command(app), "commands"))  # noqa: B009 - typer does not say that this is a group


def test_everything_that_is_copied_exists_and_reaches_the_builder(dockerfile: list[str], project_root: Path) -> None:
    ignore = [line for line in (project_root / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    allowed = [line.removeprefix("!/") for line in ignore if line.startswith("!")]
    copied = [
        source
        for words in map(shlex.split, dockerfile)
        if words[0] == "COPY" and not words[1].startswith("--from")
        for source in words[1:-1]
    ]
    assert copied
    for source in copied:
        assert (project_root / source).exists(), source
        assert any(fnmatch(source, name) or source.startswith(f"{name}/") for name in allowed), source


def test_the_image_serves_without_root_and_without_development_parts(dockerfile: list[str]) -> None:
    last_stage = dockerfile[max(number for number, line in enumerate(dockerfile) if line.startswith("FROM")) :]
    user = next(line.split()[1] for line in last_stage if line.startswith("USER"))
    assert int(user) >= 1000
    assert 'CMD ["tallystick", "serve"]' in last_stage
    assert any(line.startswith("HEALTHCHECK") for line in last_stage)
    installs = [line for line in dockerfile if "pip install" in line]
    assert not any("requirements/dev.txt" in line or "embedded" in line for line in installs)
    for line in installs:
        for install in re.findall(r"pip install[^&]*", line):
            assert "--require-hashes" in install or "--no-index" in install


def test_every_service_runs_a_command_that_exists(compose: dict[str, Any]) -> None:
    commands = {name: service["command"] for name, service in own_services(compose).items()}
    assert set(commands) == {"migrate", "api", "worker"}
    for program, command in commands.values():
        assert program == "tallystick"
        assert command in command_names()


def test_every_service_has_the_time_to_end_what_it_has_begun(compose: dict[str, Any]) -> None:
    closing = 2 * CLOSE_WITHIN_SECONDS  # of what was cut short, and of all else
    needed = max(ANSWER_WITHIN_SECONDS + inbox.STOP_WITHIN_SECONDS, loops.STOP_WITHIN_SECONDS) + closing
    assert needed <= 25  # as docs/operations.md says
    for service in own_services(compose).values():
        assert int(service["stop_grace_period"].removesuffix("s")) >= needed + 5


def test_every_service_starts_after_what_it_needs(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        assert "healthcheck" in service or service["command"] == ["tallystick", "serve"], "the image has that check"
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services
            wanted = "service_completed_successfully" if needed == "migrate" else "service_healthy"
            assert how == {"condition": wanted}
    for name in ("api", "worker"):
        assert set(services[name]["depends_on"]) == {"postgres", "valkey", "migrate"}
    assert set(services["migrate"]["depends_on"]) == {"postgres", "valkey"}


def test_secrets_come_from_the_environment_or_stop_the_start(compose: dict[str, Any]) -> None:
    for service in own_services(compose).values():
        for secret in ("DATABASE_URL", "STRIPE_API_KEY", "STRIPE_WEBHOOK_SECRET"):
            assert re.search(r"\$\{[A-Z_]+:\?[^}]+\}", service["environment"][secret]), secret


def test_the_services_settings_are_settings(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What compose passes on is accepted, with the required variables given and the others left out."""
    names = {field.validation_alias for field in Settings.model_fields.values()}
    for service in own_services(compose).values():
        assert set(service["environment"]) <= names
        for name, value in service["environment"].items():
            filled = re.sub(r"\$\{[A-Z_]+:\?[^}]+\}", "sk_test_of_letters_and_digits", value)
            monkeypatch.setitem(os.environ, name, re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", filled))
        Settings()  # type: ignore[call-arg]  # everything is read from the environment


def test_every_service_reads_the_optional_settings_and_can_only_read_the_rules(compose: dict[str, Any]) -> None:
    for service in own_services(compose).values():
        assert service["env_file"] == [{"path": "tallystick.env", "required": False}]
        assert service["volumes"] == ["./rules:/etc/tallystick:ro"]


def test_valkey_keeps_what_was_accepted(compose: dict[str, Any]) -> None:
    command = compose["services"]["valkey"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "always"
    assert options["--maxmemory-policy"] == "noeviction"
    assert any(volume.endswith(":/data") for volume in compose["services"]["valkey"]["volumes"])
