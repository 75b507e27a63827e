"""A database with the registry's schema: connections, transactions, migrations. Knows no table by name.

All that is particular to SQLite stands in `_prepare_sqlite`: a write-ahead log, every commit synced, foreign keys on,
and writers that take their lock when they begin, so that none fails half way.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Table, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from prompts_store.errors import SchemaTooNew, StorageFull, StoreError

Clock = Callable[[], datetime]
SQLITE_BUSY_SECONDS = 30
_BEGIN = "sqlite_begin"  # execution option: how a transaction begins
_FULL_SQLSTATES = {"53100", "25006"}  # PostgreSQL: disk full, read-only transaction
_FULL_SQLITE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}


def utc_now() -> datetime:
    return datetime.now(UTC)


def timestamp(moment: datetime) -> str:
    """UTC, ISO 8601, of one width, so that text sorts as time."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Database:
    """Transactions on one database. Thread-safe; one writer at a time."""

    def __init__(self, url: str | URL) -> None:
        self._engine = reading = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            _prepare_sqlite(self._engine)
        else:
            reading = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self._writing = self._engine.execution_options(**{_BEGIN: "IMMEDIATE"})
        self._read = sessionmaker(reading)
        self._write = sessionmaker(self._writing, expire_on_commit=False)
        self._writer = threading.RLock()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One state of the database, whatever is written meanwhile."""
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Committed and synced where the block ends well, else undone. Raises StorageFull."""
        with self._writer, _disk_errors(), self._write.begin() as session:
            yield session

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other writers out for more than one transaction."""
        with self._writer:
            yield

    def migrate(self) -> None:
        """Create the schema, or bring it up to date. Raises SchemaTooNew, StorageFull, StoreError."""
        config = Config()
        config.set_main_option("script_location", "prompts_store:migrations")
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        with _unreadable(), _disk_errors(), self._writing.begin() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in known:
                raise SchemaTooNew(
                    f"the store's schema is {current}, which this release does not know; use a newer one"
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self._engine.dispose()


@dataclass(frozen=True, slots=True)
class Repository:
    """What each of the registry's parts stands on: one namespace of one database."""

    database: Database
    namespace: str
    clock: Clock

    def now(self) -> str:
        return timestamp(self.clock())


def insert(session: Session, row: DeclarativeBase) -> tuple[Any, ...]:
    """Add a row at once; its key. A third of what the session's bookkeeping takes, of which a new row needs none."""
    table = cast(Table, row.__table__)
    values = {c.key: value for c in table.columns if (value := getattr(row, c.key)) is not None}
    return tuple(session.connection().execute(table.insert(), values).inserted_primary_key or ())


def _prepare_sqlite(engine: Any) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions; `begun` does
        for pragma in (
            f"busy_timeout = {SQLITE_BUSY_SECONDS * 1000}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get(_BEGIN, 'DEFERRED')}")


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        message = f"the store's database does not open: {error.orig}"
        raise StoreError(message, code="store_unreadable") from error


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        primary = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if primary in _FULL_SQLITE or getattr(error.orig, "sqlstate", None) in _FULL_SQLSTATES:
            raise StorageFull(f"nothing was stored: {error.orig}") from error
        raise
