"""Zero-shot tasks through lm-eval over a fixed list of items, from a folder of the user's or as lm-eval fetches them.

The items of a task are the first by a hash of their ids, so that every condition, on every machine, answers the same
ones. Knows the tasks' records; knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import preprocess

from lab.data.documents import DataError, decode, records
from lab.evaluate.bootstrap import Estimate, Paired, estimate

ITEMS = 1000

Record = Mapping[str, Any]
Asked = tuple[str, Sequence[str]]  # the query, and the choices


def _hellaswag(row: Record) -> Asked:
    before = row["context"].removesuffix(row["ctx_b"])
    asked = f"{row['activity_label']}: {before.rstrip()} {row['ctx_b'].capitalize()}"
    return preprocess(asked), [preprocess(ending) for ending in row["choices"]]


@dataclass(frozen=True, slots=True)
class Offline:
    """Where a task's records lie in a folder of data, and how lm-eval's task of that name asks them."""

    file: str
    ask: Callable[[Record], Asked]
    normalised: bool = True  # whether accuracy by the length of a choice is told, too
    unlike: str | None = None  # a file whose questions are left out


OFFLINE: Mapping[str, Offline] = MappingProxyType(
    {
        "hellaswag": Offline("hellaswag/validation.jsonl", _hellaswag),
        "piqa": Offline("piqa/validation.jsonl", lambda row: (f"Question: {row['question']}\nAnswer:", row["choices"])),
        "arc_easy": Offline(
            "arc_easy/validation.jsonl", lambda row: (f"Question: {row['question']}\nAnswer:", row["choices"])
        ),
        "boolq": Offline(
            "boolq/validation.jsonl",
            lambda row: (f"{row['context']}\nQuestion: {row['question']}?\nAnswer:", row["choices"]),
            normalised=False,
        ),
        "openbookqa": Offline(
            "openbookqa/test.jsonl", lambda row: (row["question"], row["choices"]), unlike="openbookqa/train.jsonl"
        ),
    }
)


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on the items, with an interval over them; `floor` is what always giving the most frequent answer gets.

    `correct` has one place for each item in order, so that two conditions can be compared item by item.
    """

    task: str
    accuracy: Estimate
    normalised: Estimate | None
    floor: float | None
    items: int
    digest: str | None
    correct: tuple[bool, ...]

    def told(self) -> Mapping[str, Any]:
        """As JSON; `correct` as a text of 0 and 1."""
        return {
            "accuracy": self.accuracy.told(),
            "accuracy_normalised": self.normalised and self.normalised.told(),
            "floor": self.floor,
            "items": self.items,
            "digest": self.digest,
            "correct": "".join("01"[each] for each in self.correct),
        }


def run_tasks(lm: LM, names: Sequence[str], root: Path | None, *, items: int = ITEMS) -> dict[str, TaskResult]:
    """Each task's result. A task of OFFLINE comes from `root` if that holds its file; any other name is lm-eval's own.

    Raises DataError for a file that is not as it should be, and for a task that lm-eval does not know or get.
    """
    disable_progress_bars()
    local = {name: offline(name, root, items) for name in names if _held(name, root)}
    tasks: dict[str, Any] = {name: task for name, (task, _, _) in local.items()}
    try:
        if others := [name for name in names if name not in local]:
            tasks |= TaskManager().load(others)["tasks"]
        told = evaluator.evaluate(
            lm=lm,
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            limit=items,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        hint = f"; put {', '.join(spec.file for spec in OFFLINE.values())} into a folder: --data-root"
        raise DataError(f"--tasks {','.join(names)}: {str(error).splitlines()[0]}{hint}") from error
    return {name: _result(name, told["samples"][name], local.get(name)) for name in tasks}


def offline(name: str, root: Path | None, items: int = ITEMS) -> tuple[ConfigurableTask, float, str]:
    """(lm-eval's task over local items, share of the most frequent answer, digest of the items). Raises DataError."""
    assert root is not None
    spec = OFFLINE[name]
    try:
        left_out = {row["question"] for row in _rows(root / spec.unlike)} if spec.unlike else set()
        rows = [row for row in _rows(root / spec.file) if not left_out or row["question"] not in left_out]
        rows.sort(key=lambda row: hashlib.sha256(f"{name} {row.get('id', spec.ask(row))}".encode()).digest())
        made = [
            {"query": q, "choices": list(c), "gold": int(row["answer"])}
            for row in rows[:items]
            for q, c in [spec.ask(row)]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / spec.file}: a record lacks {error}, or has it in another form") from error
    if not made:
        raise DataError(f"{root / spec.file} holds no items")
    metrics = ["acc", "acc_norm"] if spec.normalised else ["acc"]
    task = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(made)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        }
    )
    most = max(Counter(row["gold"] for row in made).values())
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    return task, most / len(made), f"sha256:{digest}"


def _held(name: str, root: Path | None) -> bool:
    return root is not None and name in OFFLINE and (root / OFFLINE[name].file).is_file()


def _rows(file: Path) -> Iterator[Record]:
    if not file.is_file():
        raise DataError(f"there is no {file}")
    return (row for _, row in records(decode(file.read_bytes(), file), file))


def _result(name: str, samples: Sequence[Record], local: tuple[Any, float, str] | None) -> TaskResult:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    measured = {metric: [float(s[metric]) for s in ordered] for metric in ("acc", "acc_norm") if metric in ordered[0]}
    if "acc" not in measured:
        raise DataError(f"the task {name} tells no accuracy; take one that does")
    found = {metric: _estimate(values) for metric, values in measured.items()}
    return TaskResult(
        name,
        found["acc"],
        found.get("acc_norm"),
        local[1] if local else None,
        len(ordered),
        local[2] if local else None,
        tuple(value > 0 for value in measured["acc"]),
    )


def _estimate(values: Sequence[float]) -> Estimate:
    return estimate(Paired(np.array([values]), np.ones(len(values)), "item"), lambda means: means[0])
