"""The database: migrated to just what the tables say, and never opened by a release that is too old for it."""

import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import create_engine

from prompts_store.errors import SchemaTooNew, StoreError
from prompts_store.file import PromptFile
from prompts_store.store import PromptStore
from prompts_store.tables import Base


def statements(path) -> set[str]:
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name <> 'alembic_version'")
        return {" ".join(sql.split()) for (sql,) in rows}


def test_the_migrations_make_what_the_tables_say(tmp_path):
    PromptStore.open(tmp_path).close()
    engine = create_engine(f"sqlite:///{tmp_path}/tables.db")
    Base.metadata.create_all(engine)
    engine.dispose()
    assert statements(tmp_path / "store.db") == statements(tmp_path / "tables.db")
    assert len(statements(tmp_path / "store.db")) == 10  # seven tables, three indices


def test_every_row_has_a_namespace():
    assert [table.name for table in Base.metadata.sorted_tables if "namespace" not in table.columns] == []


def test_a_newer_schema_is_refused_and_left_alone(tmp_path, rows):
    with PromptStore.open(tmp_path) as store:
        store.push(PromptFile(rows(1)), "general", "s50")
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    for _ in range(2):  # twice: the refusal lets go of the lock
        with pytest.raises(SchemaTooNew, match="9999"):
            PromptStore.open(tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '0001'")
    with PromptStore.open(tmp_path) as store:
        assert store.load(rows(1).digest) == rows(1)


def test_what_is_no_database_is_said_to_be_none(tmp_path):
    (tmp_path / "store.db").write_bytes(b"Dear diary, " * 1000)
    for _ in range(2):
        with pytest.raises(StoreError, match="not a database") as refused:
            PromptStore.open(tmp_path)
        assert refused.value.code == "store_unreadable"


def test_a_database_that_died_before_its_schema_was_whole_starts_anew(tmp_path):
    (tmp_path / "store.db").touch()
    with PromptStore.open(tmp_path) as store:
        assert store.versions.tasks().items == ()
