"""What it costs to find a prompt, in statements and in instructions of SQLite: no more where there are many others."""

from collections import Counter

import pytest
from sqlalchemy import Engine, event, insert

from prompts_store.file import PromptFile
from prompts_store.reference import parse_reference
from prompts_store.resolution import Query, Served
from prompts_store.store import PromptStore
from prompts_store.tables import PromptRow, VersionRow

LEVEL = "w3g64"
MANY = 10_000


def crowd(store: PromptStore, count: int) -> None:
    """Versions of other tasks, straight into the tables: a push syncs its blob, which is not what is counted."""
    everywhere = {"namespace": store.namespace}
    size = {"kind": "rows", "base": "b", "shape": [4, 8], "bos": "tokenizer", "chat_template": "t", "size": 1}
    by = {"level": LEVEL, "live": 1, "uploaded_at": store.versions.now(), "uploaded_by": "test"}
    prompts = [{**everywhere, **size, "digest": f"d{i}", "blob": f"b{i}"} for i in range(count)]
    versions = [{**everywhere, **by, "digest": f"d{i}", "task": f"t{i // 10}", "version": i % 10} for i in range(count)]
    with store._database.write() as session:
        session.execute(insert(PromptRow), prompts)
        session.execute(insert(VersionRow), versions)


@pytest.fixture
def found(tmp_path, rows):
    """found(others): statements and instructions of finding and loading one prompt beside that many versions."""

    def found(others: int) -> Counter[str]:
        counts: Counter[str] = Counter()

        def stepped() -> None:
            counts["instructions"] += 1

        def counted(connection, cursor, statement, *_) -> None:
            counts["statements"] += not statement.startswith("BEGIN")
            cursor.connection.set_progress_handler(stepped, 1)

        with PromptStore.open(tmp_path / str(others)) as store:
            crowd(store, others)
            store.push(PromptFile(rows(1)), "general", LEVEL)
            query = Query(parse_reference("general")), Served(rows(1).base, LEVEL, None)
            event.listen(Engine, "before_cursor_execute", counted)
            try:
                version = store.resolve(*query).version
                assert version is not None
                store.load(version.digest)
            finally:
                event.remove(Engine, "before_cursor_execute", counted)
        return counts

    return found


def test_a_prompt_is_found_at_the_same_cost_in_a_crowd(found):
    few, many = found(10), found(MANY)
    assert few["statements"] == many["statements"] <= 5
    assert 0 < many["instructions"] <= 1.1 * few["instructions"]
