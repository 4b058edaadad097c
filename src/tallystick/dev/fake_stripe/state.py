"""What the account remembers: objects by kind and id, in memory and, if asked, in one SQLite file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Object = dict[str, Any]
"""A Stripe object as it goes over the wire. Keys that begin with an underscore are the fake's own and never sent."""

# The fields by which objects are looked up: none of these lookups may scan all objects of a kind.
INDEXED = {
    "subscription": ("customer",),
    "subscription_item": ("subscription",),
    "invoice": ("customer", "_subscription"),
    "invoiceitem": ("customer",),
    "invoice_payment": ("invoice",),
    "payment_method": ("customer",),
    "billing.meter": ("event_name",),
    "product_feature": ("_product",),
    "entitlements.active_entitlement": ("_customer",),
    "checkout.session": ("customer",),
    "_delivery": ("event",),
}

TABLE = """
CREATE TABLE IF NOT EXISTS objects (
    position INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL,
    UNIQUE (kind, id)
)
"""

UPSERT = """
INSERT INTO objects (kind, id, body) VALUES (?, ?, ?) ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body
"""


class State:
    """All objects, each known by its own `object` (the kind) and `id`, in the order in which they were made."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._objects: dict[str, dict[str, Object]] = defaultdict(dict)
        self._index: dict[tuple[str, str], dict[Any, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        self._indexed_values: dict[tuple[str, str, str], Any] = {}
        self._unsaved: dict[tuple[str, str], None] = {}
        self._connection: sqlite3.Connection | None = None
        self.changed = asyncio.Event()
        """Set when the file falls behind."""

    def get(self, kind: str, object_id: str) -> Object | None:
        """One object, or None."""
        return self._objects[kind].get(object_id)

    def all(self, kind: str) -> list[Object]:
        """All objects of a kind, oldest first."""
        return list(self._objects[kind].values())

    def newest_first(self, kind: str) -> Iterator[Object]:
        """All objects of a kind, newest first. Nothing may be put while this runs."""
        return reversed(self._objects[kind].values())

    def count(self, kind: str) -> int:
        """How many objects of a kind there are."""
        return len(self._objects[kind])

    def oldest(self, kind: str) -> Object:
        """The object of a kind that was made first. There must be one."""
        return next(iter(self._objects[kind].values()))

    def where(self, kind: str, field: str, value: Any) -> list[Object]:
        """The objects of a kind whose indexed field has this value, oldest first."""
        return [self._objects[kind][object_id] for object_id in self._index[kind, field].get(value, ())]

    def put(self, item: Object) -> Object:
        """Keeps an object, new or changed. Returns it."""
        kind, object_id = item["object"], item["id"]
        self._objects[kind][object_id] = item
        for field in INDEXED.get(kind, ()):
            value, key = item.get(field), (kind, field, object_id)
            known = key in self._indexed_values
            if known and self._indexed_values[key] == value:
                continue
            if known:
                del self._index[kind, field][self._indexed_values[key]][object_id]
            self._indexed_values[key] = value
            self._index[kind, field][value][object_id] = None
        self._mark(kind, object_id)
        return item

    def remove(self, kind: str, object_id: str) -> None:
        """Forgets an object."""
        del self._objects[kind][object_id]
        for field in INDEXED.get(kind, ()):
            value = self._indexed_values.pop((kind, field, object_id))
            del self._index[kind, field][value][object_id]
        self._mark(kind, object_id)

    def _mark(self, kind: str, object_id: str) -> None:
        if self._path is not None:
            self._unsaved[kind, object_id] = None
            self.changed.set()

    def clear(self) -> None:
        """Forgets everything."""
        for kind, objects in self._objects.items():
            for object_id in objects:
                self._mark(kind, object_id)
        self._objects.clear()
        self._index.clear()
        self._indexed_values.clear()

    def open(self) -> None:
        """Reads the file, if there is one to keep the state in. Raises sqlite3.DatabaseError for any other file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self._path, isolation_level=None)
        # With the write-ahead log a save is atomic and does not wait for the disk; a killed process loses none of it.
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute(TABLE)
        for (body,) in self._connection.execute("SELECT body FROM objects ORDER BY position"):
            self.put(json.loads(body))
        self._unsaved.clear()

    def save(self) -> None:
        """Writes what changed since the last save, in one transaction. Raises sqlite3.Error, and can be tried again."""
        if self._connection is None or not self._unsaved:
            return
        kept: list[tuple[str, str, str]] = []
        gone: list[tuple[str, str]] = []
        for kind, object_id in self._unsaved:
            item = self._objects[kind].get(object_id)
            if item is None:
                gone.append((kind, object_id))
            else:
                kept.append((kind, object_id, json.dumps(item, separators=(",", ":"))))
        try:
            self._connection.execute("BEGIN")
            self._connection.executemany("DELETE FROM objects WHERE kind = ? AND id = ?", gone)
            self._connection.executemany(UPSERT, kept)
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._unsaved.clear()

    def close(self) -> None:
        """Saves and lets go of the file."""
        if self._connection is not None:
            self.save()
            with contextlib.closing(self._connection):
                self._connection = None
