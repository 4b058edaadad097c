import os
import re
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tallystick.config import Settings, load_settings
from tallystick.errors import SettingsError
from tallystick.rules import REREAD_EVERY, AccessRules, Rules, RulesFile, load_rules

REQUIRED = {
    "DATABASE_URL": "postgresql://localhost/tallystick",
    "REDIS_URL": "redis://localhost",
    "STRIPE_API_KEY": "sk_test_123",
    "STRIPE_WEBHOOK_SECRET": "whsec_one_secret",
}


def setting_names() -> dict[str, str]:
    """Environment variable → attribute, for every setting."""
    return {str(field.validation_alias): name for name, field in Settings.model_fields.items()}


def set_environment(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    for name, value in (REQUIRED | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)


def test_every_setting_is_documented_and_every_documented_setting_exists(project_root: Path) -> None:
    page = (project_root / "docs" / "configuration.md").read_text()
    documented = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE))
    assert documented == set(setting_names())


def test_the_documented_defaults_are_the_defaults(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (project_root / "docs" / "configuration.md").read_text()
    set_environment(monkeypatch)
    settings = load_settings()
    for name, default in re.findall(r"^\| `([A-Z_]+)` \| `([^`]+)`", page, re.MULTILINE):
        assert str(getattr(settings, setting_names()[name])) == default, name


def test_the_documented_rules_are_good_and_their_access_is_the_default(project_root: Path, tmp_path: Path) -> None:
    page = (project_root / "docs" / "configuration.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "rules.toml"
    file.write_text(example)
    rules = load_rules(file)
    assert rules.access == Rules().access
    assert set(AccessRules.model_fields) == set(tomllib.loads(example)["access"])
    assert [endpoint.name for endpoint in rules.notifications] == ["product"]
    assert list(rules.webhooks) == ["eu"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[access]\ngrace = 3", "access.grace"),
        ("[access]\nunpaid = 'sometimes'", "access.unpaid"),
        ("[webhooks.eu]\nsecrets = []\nlivemode = true", "webhooks.eu.secrets"),
        ("[access", "rules.toml"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_rules(file)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_changed_rules_are_read_again_and_broken_ones_are_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text("[access]\ngrace_days = 1")
    rules, now = RulesFile(file), datetime.now(UTC)
    assert rules.current(now).access.grace_days == 1
    for number, (text, days) in enumerate([("grace_days = 7", 7), ("grace_days = -1", 7), ("grace_days = 3", 3)], 1):
        file.write_text(f"[access]\n{text}")
        os.utime(file, ns=(number, number))
        assert rules.current(now + number * REREAD_EVERY).access.grace_days == days


def test_a_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, REDIS_URL=None, STRIPE_API_KEY="")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert str(refused.value) == "REDIS_URL is not set; STRIPE_API_KEY is not set"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://localhost/x"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "redis://:pass/word@localhost:6379"),
        ("STRIPE_WEBHOOK_SECRET", "short"),
        ("STRIPE_WEBHOOK_SECRET", " , "),
        ("STRIPE_API_BASE", "api.stripe.com"),
        ("TALLYSTICK_PORT", "http"),
        ("TALLYSTICK_USAGE_DEDUPE_HOURS", "1"),
        ("TALLYSTICK_SEAL_THRESHOLD", "NaN"),
        ("TALLYSTICK_PORTAL_RETURN_ORIGINS", "https://app.example.com/path"),
        ("TALLYSTICK_PORTAL_RETURN_ORIGINS", "app.example.com"),
        ("TALLYSTICK_PORTAL_RETURN_ORIGINS", "https://user@app.example.com"),
        ("TALLYSTICK_PORTAL_RETURN_ORIGINS", "https://app.example.com:443"),
        ("TALLYSTICK_CORS_ORIGINS", "*"),
        ("TALLYSTICK_CORS_ORIGINS", "https://*.example.com"),
        ("TALLYSTICK_CORS_ORIGINS", "null"),
        ("TALLYSTICK_CORS_ORIGINS", "https://app.example.com, http://b\u00fccher.example"),
        ("TALLYSTICK_JWT_JWKS_URL", "http://login.example.com/keys"),
        ("TALLYSTICK_JWT_JWKS_URL", "https://user:secret@login.example.com/keys"),
        ("TALLYSTICK_JWT_JWKS_URL", "login.example.com/keys"),
        ("TALLYSTICK_JWT_SECRET", "x" * 31),
        ("TALLYSTICK_JWT_ALGORITHMS", "HS256"),
        ("TALLYSTICK_JWT_ALGORITHMS", "RS256, none"),
    ],
)
def test_a_wrong_setting_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_environment(monkeypatch, **{name: value})
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert str(refused.value).startswith(f"{name}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"JWT_SECRET": "x" * 32, "JWT_ISSUER": "i"}, "TALLYSTICK_JWT_AUDIENCE is not set"),
        ({"JWT_SECRET": "x" * 32, "JWT_AUDIENCE": "a"}, "TALLYSTICK_JWT_ISSUER is not set"),
        (
            {"JWT_SECRET": "x" * 32, "JWT_JWKS_URL": "https://login.example.com/keys"},
            "TALLYSTICK_JWT_JWKS_URL and TALLYSTICK_JWT_SECRET are both set",
        ),
    ],
)
def test_tokens_are_checked_completely_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], named: str
) -> None:
    set_environment(monkeypatch, **{f"TALLYSTICK_{name}": value for name, value in changed.items()})
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert str(refused.value).startswith(named)
    assert "x" * 32 not in str(refused.value)


def test_origins_and_key_sets_are_taken_as_they_should_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(
        monkeypatch,
        TALLYSTICK_CORS_ORIGINS="https://App.example.com/, http://localhost:3000,http://[::1]:8000",
        TALLYSTICK_JWT_JWKS_URL="http://127.0.0.1:9000/keys",
        TALLYSTICK_JWT_ISSUER="i",
        TALLYSTICK_JWT_AUDIENCE="a",
        TALLYSTICK_JWT_ALGORITHMS="ES256, EdDSA",
    )
    settings = load_settings()
    assert settings.cors_origins == ("https://app.example.com", "http://localhost:3000", "http://[::1]:8000")
    assert settings.jwt_algorithms == ("ES256", "EdDSA")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TALLYSTICK_PROT", "TALLYSTICK_PORT"),
        ("TALLYSTICK_LOGLEVEL", "TALLYSTICK_LOG_LEVEL"),
        ("TALLYSTICK_PORTAL_RETURN_ORIGIN", "TALLYSTICK_PORTAL_RETURN_ORIGINS"),
    ],
)
def test_a_misspelt_setting_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    set_environment(monkeypatch, **{name: "8081"})
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert str(refused.value) == f"{name} is no setting; did you mean {meant}?"


def test_variables_of_others_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("KEY", "URL", "API_KEY", "HOME", "VERSION", "FAKE_STRIPE_PORT"),
        # By Kubernetes, for services that are named tallystick, tallystick-metrics, tallystick-worker and -stripe.
        *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8080_TCP", "PORT_8080_TCP_PORT"),
        *("PORT_8080_TCP_ADDR", "PORT_8080_TCP_PROTO", "METRICS_PORT", "WORKER_PORT", "API_PORT", "STRIPE_PORT"),
    ):
        monkeypatch.setenv(f"TALLYSTICK_{name}", "tcp://10.0.0.1:8080")
    set_environment(monkeypatch)
    load_settings()


def test_several_webhook_secrets_may_be_valid_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, STRIPE_WEBHOOK_SECRET="whsec_old_secret, whsec_new_secret")
    secrets = [secret.get_secret_value() for secret in load_settings().stripe_webhook_secret]
    assert secrets == ["whsec_old_secret", "whsec_new_secret"]


def test_secrets_do_not_show_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
    assert "sk_test_123" not in repr(load_settings())
    assert "whsec_one_secret" not in repr(load_settings())


@pytest.mark.parametrize(("key", "live"), [("sk_test_1", False), ("rk_live_1", True), ("sk_live_1", True)])
def test_the_mode_follows_the_key(monkeypatch: pytest.MonkeyPatch, key: str, live: bool) -> None:
    set_environment(monkeypatch, STRIPE_API_KEY=key)
    assert load_settings().livemode is live
