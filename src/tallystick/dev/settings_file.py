"""`.tallystick/settings.sh`: what the commands beside a running stack are told, for `scripts/run` to read."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from pydantic import SecretStr

from tallystick.config import Settings

# They name other people's servers, and hold their passwords.
KEPT_BACK = ("DATABASE_URL", "REDIS_URL", "STRIPE_")


def write_shell(own: Mapping[str, str], given: Mapping[str, str]) -> str:
    """The file's text. `own`: what the stack's processes are told; `given`: the environment that it was started in.

    A secret that was given stays in its terminal; so do the servers that were. Their names are in the file, so that
    a command can ask for them. All other settings that were given are written, but yield to those of a command's own:
    without the rules file, say, it would undo what the running processes have decided by it.
    """
    lines = [f"export {name}={shlex.quote(own[name])}" for name in sorted(own) if given.get(name) != own[name]]
    kept_back = []
    for field in Settings.model_fields.values():
        name = str(field.validation_alias)
        value = given.get(name)
        if not value or own.get(name, value) != value:
            continue
        if name.startswith(KEPT_BACK):
            kept_back.append(name)
        elif name.startswith("TALLYSTICK_") and not _holds(field.annotation, SecretStr):
            if _holds(field.annotation, Path):
                value = str(Path(value).absolute())
            lines.append(f'[ -n "${{{name}:-}}" ] || export {name}={shlex.quote(value)}')
    return "\n".join([*lines, f"given='{' '.join(kept_back)}'", ""])


def _holds(annotation: object, kind: type) -> bool:
    """Whether a setting's type is `kind`, or has it as a part."""
    return annotation is kind or any(_holds(part, kind) for part in get_args(annotation))
