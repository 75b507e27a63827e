"""The registry as its callers see it: pushes, deletes, aliases, lists, measurements, resolution."""

from dataclasses import replace

import pytest

from prompts_store.errors import (
    BadLevel,
    BadReference,
    Conflict,
    Gone,
    InvalidArtifact,
    NotFound,
    PreconditionFailed,
    PreconditionRequired,
    Unresolved,
)
from prompts_store.file import PromptFile, Provenance, read_prompt
from prompts_store.golden import Golden
from prompts_store.records import Actor, Measurement
from prompts_store.reference import parse_reference
from prompts_store.resolution import Query, Served
from prompts_store.store import PromptStore

W = "sha256:" + "77" * 32
DATA = "sha256:" + "dd" * 32
ORIGIN = Provenance("elsewhere", "w3g64", W, {"steps": 100, "lr": 0.3}, "2026-11-24T05:22:00Z", Golden((1, 2), 3.5))


def ask(store, text, policy="transfer", level="w3g64", base="sha256:" + "ba" * 32, weights=None):
    return store.resolve(Query(parse_reference(text), policy), Served(base, level, weights))


def test_a_push_comes_back_whole(store, rows):
    version, created = store.push(PromptFile(rows(1), ORIGIN), "general", by=Actor("key_1", "req-1", "::1"))
    assert created
    assert (version.task, version.version, version.level, version.weights) == ("general", 1, "w3g64", W)
    assert (version.digest, version.base, version.shape, version.bos) == (
        rows(1).digest,
        rows(1).base,
        (4, 8),
        "tokenizer",
    )
    assert (version.train, version.created, version.uploaded_by) == (ORIGIN.train, ORIGIN.created, "key_1")
    assert (version.num_virtual_tokens, version.hidden_size, version.deleted_at) == (4, 8, None)
    assert store.versions.get("general", 1) == version
    assert store.load(version.digest) == rows(1)
    file = read_prompt(store.content("general", 1))
    assert file.prompt == rows(1)
    assert file.provenance == replace(ORIGIN, task="general")


def test_pushing_again_changes_nothing(store, rows):
    first, _ = store.push(PromptFile(rows(1)), "general", "w3g64")
    again, created = store.push(PromptFile(rows(1), Provenance(train={"other": 1})), "general", "w3g64")
    assert (again, created) == (first, False)
    assert store.push(PromptFile(rows(1)), "general", "s50")[0].version == 2
    assert store.push(PromptFile(rows(1)), "other", "w3g64")[0].version == 1


def test_two_tasks_share_one_blob_until_the_last_goes(store, rows, blob_files):
    for task in ("one", "two"):
        store.push(PromptFile(rows(1)), task, "s50")
    assert len(blob_files()) == 1
    stats = store.stats()
    assert (stats.tasks, stats.versions) == (2, 2)
    assert stats.blob_bytes == store.versions.get("one", 1).size
    store.delete("one", 1)
    assert store.load(rows(1).digest) == rows(1)
    store.delete("two", 1)
    assert blob_files() == []
    assert store.stats().blob_bytes == 0
    with pytest.raises(Gone):
        store.load(rows(1).digest)


def test_levels_are_told_once(store, rows):
    with pytest.raises(InvalidArtifact) as refused:
        store.push(PromptFile(rows(1)), "general")
    assert refused.value.code == "level_unknown"
    with pytest.raises(InvalidArtifact) as refused:
        store.push(PromptFile(rows(1), ORIGIN), "general", "s50")
    assert refused.value.code == "level_mismatch"
    with pytest.raises(BadLevel):
        store.push(PromptFile(rows(1)), "general", "W4G128")
    with pytest.raises(BadReference):
        store.push(PromptFile(rows(1)), "../general", "s50")
    assert store.push(PromptFile(rows(1), ORIGIN), "general", "w3g64")[1]


def test_a_refused_push_leaves_nothing(store, rows, blob_files):
    with pytest.raises(BadLevel):
        store.push(PromptFile(rows(1)), "general", "nonsense")
    assert blob_files() == []
    assert store.audit.list().items == ()


def test_a_tombstone_keeps_its_number(store, rows):
    store.push(PromptFile(rows(1)), "general", "s50")
    store.delete("general", 1)
    with pytest.raises(Gone):
        store.versions.get("general", 1)
    with pytest.raises(NotFound, match="already"):
        store.delete("general", 1)
    with pytest.raises(NotFound):
        store.delete("general", 2)
    with pytest.raises(Gone):
        store.content("general", 1)
    assert store.versions.list("general").items == ()
    assert store.versions.tasks().items == ()
    version, created = store.push(PromptFile(rows(1)), "general", "s50")
    assert (version.version, created) == (2, True)
    assert store.load(rows(1).digest) == rows(1)


def test_an_alias_moves_by_compare_and_set(store, rows):
    for seed in (1, 2):
        store.push(PromptFile(rows(seed)), "general", "s50")
    here = {"base": rows(1).base, "level": "s50"}
    first, created = store.aliases.put("general", "default", 1, by=Actor("ann"))
    assert created
    assert (first.version, first.digest, first.level, first.updated_by) == (1, rows(1).digest, "s50", "ann")
    with pytest.raises(PreconditionRequired):
        store.aliases.put("general", "default", 2)
    with pytest.raises(PreconditionFailed):
        store.aliases.put("general", "default", 2, expected="0")
    assert store.aliases.put("general", "default", 1) == (first, False)
    second, created = store.aliases.put("general", "default", 2, expected=first.revision)
    assert (second.version, second.digest, created) == (2, rows(2).digest, False)
    with pytest.raises(PreconditionFailed, match="points to 2 now"):
        store.aliases.put("general", "default", 1, expected=first.revision)
    assert store.aliases.get("general", "default", **here) == second
    with pytest.raises(PreconditionFailed):
        store.aliases.delete("general", "default", **here, expected=first.revision)
    store.aliases.delete("general", "default", **here, expected=second.revision)
    with pytest.raises(NotFound):
        store.aliases.get("general", "default", **here)
    with pytest.raises(PreconditionFailed):
        store.aliases.put("general", "default", 1, expected="*")
    anew, _ = store.aliases.put("general", "default", 1)
    assert anew.revision not in (first.revision, second.revision)


def test_an_alias_lives_in_the_level_and_base_of_its_version(store, rows, other_base):
    store.push(PromptFile(rows(1)), "general", "s50")
    store.push(PromptFile(rows(2)), "general", "s90")
    store.push(PromptFile(rows(3, base=other_base)), "general", "s50")
    assert [store.aliases.put("general", "default", n)[1] for n in (1, 2, 3)] == [True] * 3
    assert store.aliases.get("general", "default", base=other_base, level="s50").version == 3
    assert [alias.version for alias in store.aliases.list("general", level="s50", base=rows(1).base).items] == [1]
    assert [ask(store, "general", level=level).version.version for level in ("s50", "s90")] == [1, 2]


def test_an_aliased_version_stays(store, rows):
    store.push(PromptFile(rows(1)), "general", "s50")
    store.aliases.put("general", "prod", 1)
    with pytest.raises(Conflict, match="prod") as refused:
        store.delete("general", 1)
    assert refused.value.code == "version_aliased"
    store.aliases.delete("general", "prod", base=rows(1).base, level="s50")
    store.delete("general", 1)
    with pytest.raises(Gone):
        store.aliases.put("general", "prod", 1)
    with pytest.raises(NotFound):
        store.aliases.put("general", "prod", 2)
    with pytest.raises(BadReference):
        store.aliases.put("general", "a/b", 1)


def everything(read, **filters) -> list:
    """All pages of a list, three items a page."""
    items, after = [], None
    while True:
        page = read(limit=3, after=after, **filters)
        assert len(page.items) <= 3
        items += page.items
        if page.next is None:
            return items
        after = page.next


def test_lists_come_in_pages(store, rows, other_base):
    for seed in range(10):
        base = other_base if seed % 5 == 0 else rows().base
        store.push(PromptFile(rows(seed, base=base)), f"task-{seed % 4}", "s50" if seed % 2 else "nf4")
        store.push(PromptFile(rows(seed)), "many", "s50" if seed % 2 else "nf4")
    for number in (1, 2, 3, 4):
        for name in ("a", "b"):
            store.aliases.put("many", name, number) if number < 3 else store.aliases.put("many", name + "2", number)
    tasks = everything(store.versions.tasks)
    assert [task.task for task in tasks] == ["many", "task-0", "task-1", "task-2", "task-3"]
    assert (tasks[0].versions, tasks[0].latest, tasks[0].levels, tasks[0].bases) == (
        10,
        10,
        ("nf4", "s50"),
        (rows().base,),
    )
    assert tasks[1].bases == (other_base, rows().base)
    assert [task.task for task in everything(store.versions.tasks, level="nf4")] == ["many", "task-0", "task-2"]
    assert [task.task for task in everything(store.versions.tasks, base=other_base)] == ["task-0", "task-1"]
    assert [version.version for version in everything(lambda **k: store.versions.list("many", **k))] == list(
        range(1, 11)
    )
    odd = everything(lambda **k: store.versions.list("many", **k), level="nf4")
    assert [version.version for version in odd] == [1, 3, 5, 7, 9]
    assert everything(lambda **k: store.versions.list("many", **k), base=other_base) == []
    aliases = everything(store.aliases.list)
    assert [(alias.name, alias.level) for alias in aliases] == [
        (name, level) for name in ("a", "a2", "b", "b2") for level in ("nf4", "s50")
    ]
    assert len(everything(store.audit.list)) == 28
    for read in (
        store.audit.list,
        store.keys.list,
        store.aliases.list,
        lambda after: store.versions.list("many", after=after),
    ):
        with pytest.raises(BadReference):
            read(after="x")
    with pytest.raises(NotFound):
        store.versions.list("unseen")


def test_measurements_are_kept_and_read_by_resolution(store, rows):
    for seed, level in ((1, "w2g64"), (2, "w3g64")):
        store.push(PromptFile(rows(seed)), "general", level)
    assert ask(store, "general", level="w4g128").version.version == 2
    for version, value in ((1, 20.5), (2, 30.5)):
        measured = Measurement("perplexity", value, DATA, "select", "w4g128", W, 9000)
        record = store.measurements.add("general", version, measured)
        assert record.measurement == measured
    store.measurements.add("general", 2, Measurement("accuracy", 1.0, DATA, "select", "w4g128"))
    store.measurements.add("general", 2, Measurement("perplexity", 1.0, DATA, "select", "s50"))
    for split in ("report", "test"):  # what is reported must not have chosen
        store.measurements.add("general", 2, Measurement("perplexity", 1.0, DATA, split, "w4g128", W))
    answer = ask(store, "general", level="w4g128")
    assert (answer.version.version, answer.resolution.how, answer.resolution.measured) == (1, "transferred", True)
    assert [item.measurement.metric for item in everything(lambda **k: store.measurements.list("general", 2, **k))] == [
        "perplexity", "accuracy", "perplexity", "perplexity", "perplexity"
    ]  # fmt: skip


def test_resolution_through_the_store(store, rows, other_base):
    with pytest.raises(NotFound) as refused:
        ask(store, "unseen", "optional")
    assert refused.value.what == "task"
    assert ask(store, "unseen", "none").version is None
    version, _ = store.push(PromptFile(rows(1), ORIGIN), "general")
    answer = ask(store, "general", weights=W)
    assert (answer.version, answer.resolution.how, answer.resolution.same_weights) == (version, "exact", True)
    assert ask(store, f"general@{version.digest}", "exact").version == version
    with pytest.raises(Unresolved):
        ask(store, "general", "exact", level="s50")
    with pytest.raises(Conflict) as conflict:
        ask(store, "general@1", base=other_base)
    assert conflict.value.code == "base_model_mismatch"
    store.delete("general", 1)
    with pytest.raises(Gone):
        ask(store, "general@1")
    assert ask(store, "general", "optional").version is None


def test_namespaces_do_not_see_each_other(tmp_path, rows):
    with PromptStore.open(tmp_path / "store", namespace="one") as store:
        store.push(PromptFile(rows(1)), "general", "s50")
        store.aliases.put("general", "default", 1)
        _, secret = store.keys.create("x", ["infer"])
    with PromptStore.open(tmp_path / "store", namespace="two") as store:
        assert store.stats().orphans_removed == 0
        assert (store.versions.tasks().items, store.aliases.list().items, store.keys.list().items) == ((), (), ())
        assert store.audit.list().items == ()
        with pytest.raises(NotFound):
            store.load(rows(1).digest)
        assert store.push(PromptFile(rows(1)), "general", "s50")[0].version == 1
        assert store.keys.lookup(secret).namespace == "one"  # a key says whose it is
        store.delete("general", 1)
    with PromptStore.open(tmp_path / "store", namespace="one") as store:
        assert store.load(rows(1).digest) == rows(1)


def test_a_new_store_is_seeded_once(tmp_path, rows):
    first, second = (PromptFile(rows(i), replace(ORIGIN, task="general")) for i in (1, 2))
    with PromptStore.open(tmp_path / "store") as store:
        assert [version.version for version in store.seed([first])] == [1]
        assert store.seed([second]) == []
        store.delete("general", 1)
        assert store.seed([first]) == []
        assert store.audit.list().items[0].actor == "seed"


def test_a_store_gets_all_of_its_seeds_or_none(tmp_path, rows, monkeypatch):
    """A server that was stopped between two of them had a part of its prompts for good."""
    files = [PromptFile(rows(i), replace(ORIGIN, task=f"task{i}")) for i in (1, 2)]
    with PromptStore.open(tmp_path / "store") as store:
        put, calls = store._blobs.put, []

        def stopped(data):
            calls.append(data)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return put(data)

        monkeypatch.setattr(store._blobs, "put", stopped)
        with pytest.raises(KeyboardInterrupt):
            store.seed(files)
    with PromptStore.open(tmp_path / "store") as store:
        assert store.stats().versions == 0
        assert [version.task for version in store.seed(files)] == ["task1", "task2"]
        assert store.load(files[1].prompt.digest) == files[1].prompt


def test_the_audit_log_tells_who_changed_what(store, rows):
    ann = Actor("key_ann", "req-7", "192.0.2.1")
    for seed in (1, 2):
        store.push(PromptFile(rows(seed)), "general", "s50", by=ann)
    alias, _ = store.aliases.put("general", "default", 1, by=ann)
    store.aliases.put("general", "default", 2, expected=alias.revision, by=ann)
    store.delete("general", 1, by=ann)
    store.aliases.delete("general", "default", base=rows().base, level="s50", by=ann)
    key, _ = store.keys.create("ci", ["infer", "prompts:read"], by=ann)
    store.keys.revoke(key.id, by=ann)
    entries = store.audit.list().items
    assert [(entry.action, entry.before, entry.after) for entry in entries] == [
        ("version.create", None, rows(1).digest),
        ("version.create", None, rows(2).digest),
        ("alias.set", None, "1"),
        ("alias.set", "1", "2"),
        ("version.delete", rows(1).digest, None),
        ("alias.delete", "2", None),
        ("key.create", None, "infer prompts:read"),
        ("key.revoke", "infer prompts:read", None),
    ]
    assert {(entry.actor, entry.request_id, entry.address) for entry in entries} == {("key_ann", "req-7", "192.0.2.1")}
    assert entries[0].subject == "general@1"
    assert entries[2].subject == f"general:default s50 {rows().base}"
