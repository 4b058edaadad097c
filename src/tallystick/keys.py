"""`tallystick keys`: make, list, roll and revoke the API keys of the services that call this one."""

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tallystick.terminal import Json, err, fail, out, print_table, with_resources

if TYPE_CHECKING:
    from tallystick.resources import Resources

# A month: longer than any deployment of a new secret should take, and no second secret for good.
MAX_OVERLAP_HOURS = 720
KEEP_IT = "Keep it now: it is stored only as a hash and cannot be shown again."

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The middle part of tsk_<id>_<secret>, or the whole key.")]

app = typer.Typer(help="API keys of the services and frontends that call this one.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What the key is for, for people.")],
    scope: Annotated[list[str], typer.Option(help="What it may do; may be repeated.")],
    source: Annotated[
        str | None, typer.Option(help="Whose usage ids these are; two keys of one service share it. Default: the name.")
    ] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, help="Without it the key does not expire.")] = None,
    limit_per_second: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Requests a second, counted by each API process. Default: no limit."),
    ] = None,
) -> None:
    """Make an API key and print it, this once.

    Scopes: usage:write usage:read access:read portal:create customers:write admin.
    """
    if any("," in given for given in scope):
        names = (name.strip() for given in scope for name in given.split(","))
        fail(f"give each scope by itself: {' '.join(f'--scope {name}' for name in names if name)}")

    async def work(resources: "Resources") -> str:
        from tallystick import db
        from tallystick.auth import create_key

        async with db.transaction(resources.engine) as connection:
            return await create_key(
                connection,
                name=name,
                source=source or name,
                scopes=scope,
                expires_at=datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None,
                limit_per_second=limit_per_second,
            )

    try:
        text = with_resources(work)
    except ValueError as error:
        fail(str(error))
    err.print(KEEP_IT)
    out.print(text)


@app.command("list")
def list_(json_: Json = False) -> None:
    """List all keys, without their secrets."""

    async def work(resources: "Resources") -> list[dict[str, Any]]:
        from tallystick import db
        from tallystick.auth import list_keys

        async with db.transaction(resources.engine) as connection:
            return await list_keys(connection)

    found = with_resources(work)
    if json_:
        out.print_json(json.dumps(found, default=datetime.isoformat))
        return
    table = Table("id", "name", "source", "scopes", "limit", "last used", "state", box=None, pad_edge=False)
    for key in found:
        table.add_row(
            key["id"],
            key["name"],
            key["source"],
            " ".join(key["scopes"]),
            f"{key['limit_per_second']}/s" if key["limit_per_second"] else "none",
            _minute(key["last_used_at"]) if key["last_used_at"] else "never",
            _state(key),
        )
    print_table(table)


@app.command("roll")
def roll(
    key_id: KeyId,
    overlap_hours: Annotated[
        int, typer.Option(min=0, max=MAX_OVERLAP_HOURS, help="How long the old secret goes on working; 0 if it leaked.")
    ] = 24,
) -> None:
    """Give a key a new secret and print it, this once. The old one works until the overlap has ended.

    Id, source, scopes, limit and expiry stay. Rolled again within the overlap, the key keeps its last two secrets.
    """

    async def work(resources: "Resources") -> str | None:
        from tallystick import db
        from tallystick.auth import roll_key

        async with db.transaction(resources.engine) as connection:
            return await roll_key(connection, key_id, timedelta(hours=overlap_hours), datetime.now(UTC))

    key_id = _read_id(key_id)
    text = with_resources(work)
    if text is None:
        fail(f"there is no valid key {key_id}")
    err.print(KEEP_IT)
    out.print(text)


@app.command("revoke")
def revoke(key_id: KeyId) -> None:
    """Revoke a key, with all its secrets. Running services follow within ten seconds."""

    async def work(resources: "Resources") -> bool:
        from tallystick import db
        from tallystick.auth import revoke_key

        async with db.transaction(resources.engine) as connection:
            return await revoke_key(connection, key_id)

    key_id = _read_id(key_id)
    if not with_resources(work):
        fail(f"there is no valid key {key_id}")
    out.print(f"Revoked {key_id}.")


def _read_id(given: str) -> str:
    """The id of a key that was given by its id or as a whole, as one has it when it leaked.

    What is neither is not repeated in the error: it may have a secret in it.
    """
    from tallystick.auth import KEY_ID, KEY_PREFIX

    key_id = given.removeprefix(KEY_PREFIX).partition("_")[0]
    if not KEY_ID.fullmatch(key_id):
        fail("that is no key's id: it is the middle part of tsk_<id>_<secret>")
    return key_id


def _state(key: dict[str, Any]) -> str:
    parts = [key["state"]]
    if key["state"] == "valid" and key["expires_at"]:
        parts[0] += f" until {_minute(key['expires_at'])}"
    if key["rolled_at"]:
        parts.append(f"rolled {_minute(key['rolled_at'])}")
    if key["state"] == "valid" and key["old_valid_until"]:
        parts.append(f"old secret until {_minute(key['old_valid_until'])}")
    return ", ".join(parts)


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"
