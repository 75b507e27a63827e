"""The database: migrated to just what the tables say, and never opened by a release that is too old for it."""

import sqlite3
from contextlib import closing

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from prompts_store.blobs import LocalBlobs
from prompts_store.errors import SchemaTooNew, StoreError
from prompts_store.file import PromptFile, Provenance, encode_prompt
from prompts_store.records import Measurement
from prompts_store.store import PromptStore
from prompts_store.tables import Base


def statements(path) -> set[tuple[str, ...]]:
    """What made each table and index, but for the order of columns: a column that came later stands at the end."""
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name <> 'alembic_version'")
        return {tuple(sorted(part.strip(" ()") for part in " ".join(sql.split()).split(","))) for (sql,) in rows}


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
        [(head,)] = database.execute("SELECT version_num FROM alembic_version")
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    for _ in range(2):  # twice: the refusal lets go of the lock
        with pytest.raises(SchemaTooNew, match="9999"):
            PromptStore.open(tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (head,))
    with PromptStore.open(tmp_path) as store:
        assert store.load(rows(1).digest) == rows(1)


def test_a_store_of_the_first_schema_is_brought_up_to_date_with_all_it_holds(tmp_path, rows):
    dataset = "sha256:" + "cd" * 32
    config = Config()
    config.set_main_option("script_location", "prompts_store:migrations")
    engine = create_engine(f"sqlite:///{tmp_path}/store.db")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    made = LocalBlobs(tmp_path / "blobs")
    file = PromptFile(rows(1), Provenance(level="s50"))
    blob = made.put(encode_prompt(PromptFile(rows(1))))
    made.close()
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        prompt = ("default", file.prompt.digest, "rows", file.prompt.base, "[4, 8]", "tokenizer", "none", blob, 1)
        database.execute("INSERT INTO prompts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", prompt)
        version = ("default", "t", 1, "s50", file.prompt.digest, 1, None, None, None, "then", "me", None)
        database.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", version)
        measured = (1, "default", "t", 1, "perplexity", 9.5, dataset, "select", "s50", None, None, "then", "me")
        database.execute("INSERT INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", measured)
    with PromptStore.open(tmp_path) as store:
        assert store.versions.get("t", 1).golden is None
        assert store.load(file.prompt.digest) == rows(1)
        [recorded] = store.measurements.list("t", 1).items
        assert recorded.measurement == Measurement("perplexity", 9.5, dataset, "select", "s50")


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
