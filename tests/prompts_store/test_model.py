"""The store against a dictionary: whatever order of pushes, moves, deletes and restarts, both say the same."""

import os
import tempfile
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from prompts_store.errors import Conflict, Gone, NotFound, PreconditionFailed, PreconditionRequired
from prompts_store.file import PromptFile
from prompts_store.prompt import SoftPrompt
from prompts_store.reference import parse_reference
from prompts_store.resolution import Query, Served
from prompts_store.store import PromptStore

FULL = os.environ.get("PROMPTSTITCH_FULL") == "1"
BASE = "sha256:" + "ba" * 32
PROMPTS = [SoftPrompt("rows", BASE, {"prompt_embeddings": torch.full((1, 2), float(n))}) for n in range(4)]
TASKS = st.sampled_from(["one", "two"])
LEVELS = st.sampled_from(["s50", "nf4"])
NAMES = st.sampled_from(["default", "prod"])
NUMBERS = st.integers(1, 6)


@dataclass
class Made:
    level: str
    digest: str
    live: bool = True


@dataclass
class Model:
    """What the registry promises, in fifteen lines."""

    versions: dict[str, list[Made]] = field(default_factory=lambda: {"one": [], "two": []})
    aliases: dict[tuple[str, str, str], tuple[int, str]] = field(default_factory=dict)  # -> (version, revision)
    revisions: set[str] = field(default_factory=set)

    def find(self, task: str, number: int) -> Made | None:
        made = self.versions[task]
        return made[number - 1] if number <= len(made) else None

    def live(self, task: str) -> dict[int, Made]:
        return {n: made for n, made in enumerate(self.versions[task], 1) if made.live}

    def best(self, task: str, level: str, alias: str | None) -> int | None:
        pinned = self.aliases.get((task, alias or "default", level), (None, ""))[0]
        if alias is not None or pinned is not None:
            return pinned
        return max((n for n, made in self.live(task).items() if made.level == level), default=None)


class Registry(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # nothing here is about the disk
        self.folder = tempfile.TemporaryDirectory(dir=memory)
        self.store = PromptStore.open(self.folder.name)
        self.model = Model()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    @rule(prompt=st.sampled_from(PROMPTS), task=TASKS, level=LEVELS)
    def push(self, prompt: SoftPrompt, task: str, level: str) -> None:
        version, created = self.store.push(PromptFile(prompt), task, level)
        same = [n for n, made in self.model.live(task).items() if (made.level, made.digest) == (level, prompt.digest)]
        assert created == (not same)
        if created:
            self.model.versions[task].append(Made(level, prompt.digest))
        assert version.version == (len(self.model.versions[task]) if created else same[0])

    @rule(task=TASKS, number=NUMBERS)
    def delete(self, task: str, number: int) -> None:
        made = self.model.find(task, number)
        aliased = any(key[0] == task and value[0] == number for key, value in self.model.aliases.items())
        expected = NotFound if made is None or not made.live else Conflict if aliased else None
        assert self.outcome(lambda: self.store.delete(task, number)) is expected
        if expected is None:
            made.live = False

    @rule(task=TASKS, name=NAMES, number=NUMBERS, expect=st.sampled_from(["nothing", "current", "stale", "any"]))
    def point(self, task: str, name: str, number: int, expect: str) -> None:
        made = self.model.find(task, number)
        at, revision = self.model.aliases.get((task, name, made.level if made else ""), (None, None))
        given = {"nothing": None, "current": revision or "999999", "stale": "0", "any": "*"}[expect]
        if made is None or not made.live:
            expected = NotFound if made is None else Gone
        elif expect == "stale" or (at is None and expect != "nothing"):
            expected = PreconditionFailed
        elif at not in (None, number) and expect == "nothing":
            expected = PreconditionRequired
        else:
            expected = None
        answer = []
        assert (
            self.outcome(lambda: answer.extend(self.store.aliases.put(task, name, number, expected=given))) is expected
        )
        if expected is None:
            alias, created = answer
            assert created == (at is None)
            assert (alias.version, alias.digest, alias.level) == (number, made.digest, made.level)
            assert (alias.revision == revision) == (at == number)
            assert at == number or alias.revision not in self.model.revisions
            self.model.revisions.add(alias.revision)
            self.model.aliases[task, name, made.level] = number, alias.revision

    @rule(task=TASKS, name=NAMES, level=LEVELS)
    def unpoint(self, task: str, name: str, level: str) -> None:
        known = self.model.aliases.pop((task, name, level), None)
        outcome = self.outcome(lambda: self.store.aliases.delete(task, name, base=BASE, level=level))
        assert outcome is (None if known else NotFound)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = PromptStore.open(self.folder.name)
        assert self.store.stats().orphans_removed == 0

    @precondition(lambda self: any(self.model.versions.values()))
    @rule(task=TASKS, level=LEVELS, name=st.sampled_from([None, "default", "prod"]))
    def ask(self, task: str, level: str, name: str | None) -> None:
        query = Query(parse_reference(f"{task}:{name}" if name else task), "exact")
        best = self.model.best(task, level, name)
        found = []
        outcome = self.outcome(lambda: found.append(self.store.resolve(query, Served(BASE, level, None))))
        assert (outcome is None) == (best is not None)
        if best is not None:
            assert found[0].version.version == best
            assert self.store.load(found[0].version.digest).digest == self.model.find(task, best).digest

    @invariant()
    def says_the_same(self) -> None:
        if not hasattr(self, "store"):
            return
        live = {task: self.model.live(task) for task in ("one", "two")}
        assert [task.task for task in self.store.versions.tasks().items] == [
            task for task, made in live.items() if made
        ]
        for task, made in live.items():
            if self.model.versions[task]:
                listed = {version.version: version.digest for version in self.store.versions.list(task).items}
                assert listed == {number: version.digest for number, version in made.items()}
        aliases = {(a.task, a.name, a.level): (a.version, a.revision) for a in self.store.aliases.list().items}
        assert aliases == self.model.aliases
        assert self.store.stats().versions == sum(map(len, live.values()))

    @staticmethod
    def outcome(action) -> type[Exception] | None:
        try:
            action()
        except Exception as error:
            return next(
                kind
                for kind in (Gone, Conflict, PreconditionRequired, PreconditionFailed, NotFound)
                if isinstance(error, kind)
            )
        return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_store_is_the_dictionary():
    bounds = settings(
        max_examples=1000 if FULL else 40,
        stateful_step_count=50 if FULL else 30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Registry, settings=bounds)
