"""PostgreSQL's schema: whether it is this release's, and the migrations that make it so."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, NullPool, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tallystick.db import CONNECT_TIMEOUT_SECONDS, transaction
from tallystick.errors import SchemaError

# Alembic is imported by what migrates: to load it takes a tenth of the time in which a process starts.
if TYPE_CHECKING:
    from alembic.config import Config

# A migration may make an index over the whole ledger.
MIGRATION_TIMEOUT_SECONDS = 3_600

MIGRATION_LOCK = 0x7A11  # any number, the same for every process that migrates this database


def migrations_folder() -> Path:
    """`migrations/` of the checkout, or the copy inside the installed package."""
    packaged = Path(__file__).parent / "migrations"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"


def _alembic(connection: Connection | None = None) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


# Of the schema that the migrations write to, which is `public` unless the role has another. An extension's tables, such
# as PostGIS's, say nothing of who uses the database.
TABLES = text("""
    SELECT c.relname, current_database() AS database
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = current_schema()
     WHERE c.relkind IN ('r', 'p', 'f') AND NOT c.relispartition AND c.relname <> 'alembic_version'
       AND NOT EXISTS (SELECT FROM pg_depend d
                        WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
     ORDER BY c.relname
""")
# Since the first migration.
OUR_TABLES = {"installation", "stripe_events"}
TABLES_NAMED = 3


def _refuse_what_is_not_ours(connection: Connection) -> None:
    """Raise `SchemaError` for a database that is another program's, or further than this release."""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()}
    for revision in MigrationContext.configure(connection).get_current_heads():
        if revision not in known:
            raise SchemaError(
                f"the database is at {revision!r}, which this release does not know: it is another program's, or a"
                " newer tallystick's"
            )
    tables = connection.execute(TABLES).all()
    names = [table.relname for table in tables]
    if names and not OUR_TABLES.issubset(names):
        named = ", ".join(names[:TABLES_NAMED]) + (", …" if len(names) > TABLES_NAMED else "")
        raise SchemaError(
            f"the database {tables[0].database!r} holds other tables ({named}); give tallystick a database of its own"
        )


def _upgrade(connection: Connection) -> None:
    from alembic import command

    _refuse_what_is_not_ours(connection)
    command.upgrade(_alembic(connection), "head")


async def migrate(engine: AsyncEngine) -> None:
    """Bring the schema up to date. Safe for several processes at once: the second waits, then finds nothing to do.

    Raises `SchemaError`, having changed nothing, where there is something else than tallystick's schema.
    """
    # A connection of its own, without the limits that are meant for requests.
    patient = create_async_engine(
        engine.url, poolclass=NullPool, connect_args={"timeout": CONNECT_TIMEOUT_SECONDS}, hide_parameters=True
    )
    async with transaction(patient) as connection:
        await connection.execute(text("SET LOCAL lock_timeout = '60s'"))
        await connection.execute(text(f"SET LOCAL statement_timeout = '{MIGRATION_TIMEOUT_SECONDS}s'"))
        await connection.execute(text("SET LOCAL timezone = 'UTC'"))
        await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        await connection.run_sync(_upgrade)


async def is_current(connection: AsyncConnection) -> bool:
    """Whether the database is at the newest migration that this code knows."""
    if not await connection.scalar(text("SELECT to_regclass('alembic_version') IS NOT NULL")):
        return False
    revisions = await connection.scalars(text("SELECT version_num FROM alembic_version"))
    return revisions.all() == [_newest_revision()]


@cache
def _newest_revision() -> str:
    """As Alembic would say: a migration's file is named by its revision, and revisions count up."""
    return max(file.name.partition("_")[0] for file in (migrations_folder() / "versions").glob("*.py"))
