"""From a dense checkpoint to a prompt that is measured: compress, learn, select on one split, report on another.

    checkpoint/   and checkpoint.run/ of the solver, unless the level is made while the model loads
    learn/        run of the learning, with prompt.safetensors
    select/       the prompt against none, on data that chooses
    report/       dense, compressed, an untrained prompt and the learned one, on data that chose nothing

Each is a run folder that a kill leaves whole; a step that is finished is read and not done again. Knows the steps;
knows no registry and no page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab.compress import compress as solver
from lab.compress.job import Tokens
from lab.data.documents import DataError, Document
from lab.data.splits import Splits
from lab.data.windows import cut
from lab.disk import write_bytes
from lab.evaluate.controls import Choice
from lab.learn.budget import Budget
from lab.learn.learn import ADAPTED_TENSORS, learn
from lab.learn.order import Order as LearnOrder
from lab.learn.order import Plan as LearnPlan
from lab.learn.order import planned as planned_learning
from lab.learn.recipe import Kind, LearnError, Recipe
from lab.progress import Report
from lab.prove import Control, Material, Models, Subject, prove, prove_adapted
from lab.run import CONFIG, FIGURES, Run, open_run
from lab.transfer.samples import SPLITS, Sample, Split, sample
from lab.whole import Whole
from llama.errors import ModelError
from llama.formats import LOAD_LEVELS
from llama.identity import identify
from llama.load import info
from llama.manifest import Manifest
from llama.shards import read_json
from llama.tokenizer import HubTokenizer
from prompts_store.file import PromptFile, encode_prompt, read_prompt
from prompts_store.prompt import Bos, SoftPrompt

PROMPT = "prompt.safetensors"
CALIBRATION_WINDOW = 256


@dataclass(frozen=True)
class Order:
    """What is wanted. `level` is None for a model that is compressed already, whose `dense` checkpoint is then named.

    `method` None: levels that can be made while loading are, others come from the solver, which calibrates on so many
    `calibration` tokens; `windows` are scored of each split at most, drawn by lot; `equal` is a prompt learned on the
    dense model at equal cost, `every` asks for all controls.
    """

    model: Path
    level: str | None
    task: str | None
    kind: Kind
    recipe: Recipe
    budget: Budget
    method: str | None = None
    dense: Path | None = None
    calibration: int = 32768
    windows: int | None = 96
    bos: Bos = "tokenizer"
    dtype: str = "auto"
    device: str = "auto"
    compute: str = "auto"
    seed: int = 0
    equal: SoftPrompt | None = None
    every: bool = False
    base: str | None = None  # of a foreign compressed model, as `llama.identity.identify` takes it
    embedding: str = "keep"  # of the checkpoint that the solver writes, as it takes it; so is
    allocation: str = "uniform"


@dataclass(frozen=True)
class Places:
    """Folders: of the runs of the steps, of the packed checkpoint if one is made, of dense models' states."""

    run: Path
    checkpoint: Path
    cache: Path


@dataclass(frozen=True)
class Plan:
    """An order that holds. `solve`: a checkpoint is written first; `learning` is of the model that this leaves."""

    order: Order
    places: Places
    splits: Splits
    materials: Mapping[Split, Material]
    solve: bool
    base: str
    source: str  # weights of the model that was named
    learning: LearnPlan | None = None  # None until the checkpoint is there

    @property
    def served(self) -> tuple[Path, str | None]:
        """What is learned through and served: a folder, and the level that it is loaded at."""
        return (self.places.checkpoint, None) if self.solve else (self.order.model, self.order.level)

    @property
    def dense(self) -> Path | None:
        """The dense checkpoint, where the model that is served is not that itself."""
        order = self.order
        return order.dense or (order.model if order.level not in (None, "dense") else None)

    def record(self) -> dict[str, Any]:
        """All that the outcome depends on, for the run folder of the whole."""
        order = self.order
        return {
            "command": "recover",
            "base": self.base,
            "source": self.source,
            "level": order.level,
            "method": order.method,
            "task": order.task,
            "kind": order.kind,
            "recipe": order.recipe.told(),
            "budget": {"amount": order.budget.amount, "unit": order.budget.unit},
            "calibration": order.calibration if self.solve else None,
            **({"embedding": order.embedding} if self.solve and order.embedding != "keep" else {}),
            **({"allocation": order.allocation} if self.solve and order.allocation != "uniform" else {}),
            "windows": order.windows,
            "data": self.splits.data,
            "bos": order.bos,
            "dtype": order.dtype,
            "compute": order.compute,
        }


@dataclass(frozen=True)
class Outcome:
    """The prompt (None for a control, which chooses nothing either) and the figures of each step."""

    file: PromptFile | None
    learned: Mapping[str, Any]
    select: Mapping[str, Any] | None
    report: Mapping[str, Any] | None
    compressed: Mapping[str, Any] | None


def planned(order: Order, splits: Splits, places: Places, data: str) -> Plan:
    """Everything that can be found wrong before a weight is read is found here. `data` is what the data is called.

    Raises LearnError, DataError, ModelError.
    """
    order = replace(order, recipe=order.recipe.over(splits.parts["learn"]))
    stored = identify(order.model, base=order.base)
    if order.level is None and stored.level == "dense":
        raise LearnError(f"{order.model} is dense; say which level it is to be compressed to, --level w3g64")
    if order.level is not None and order.method is not None and stored.level != "dense":
        raise ModelError(
            f"{order.model} is {stored.level} already; compress the dense checkpoint, or leave --method out"
        )
    if order.dense is not None and (other := identify(order.dense).base) != stored.base:
        raise ModelError(
            f"--dense {order.dense} is of base {other}, the model of {stored.base}; name the dense checkpoint that the "
            "model was made from, or say that it is (--base)"
        )
    solve = order.level is not None and (order.method is not None or order.level not in LOAD_LEVELS)
    for name, asked, usual in (("embedding", order.embedding, "keep"), ("allocation", order.allocation, "uniform")):
        if asked != usual and not solve:
            raise LearnError(
                f"{name} is {asked!r}, but {order.level or 'the model'} is made while loading and writes no "
                "checkpoint; name a method, --method gptq"
            )
    if not splits.parts["calibration"] and solve:
        raise DataError("no document is left to calibrate on; give more documents, of more sites")
    plan = Plan(order, places, splits, _materials(order, splits, data), solve, stored.base, stored.weights)
    if solve and not places.checkpoint.exists():
        solver.planned(_solver_order(plan))
        tried = replace(order.recipe, distil=0.0)
        planned_learning(replace(_learn_order(plan), model=order.model, level=None, dense=None, recipe=tried), splits)
        return plan
    return replace(plan, learning=planned_learning(_learn_order(plan), splits))


def recover(plan: Plan, whole: Whole) -> Outcome:
    """Carry the plan out, or on where its folders stand. Raises LearnError, RunError, ModelError, DataError."""
    compressed = None
    if plan.solve:
        with whole.step("compress") as report:
            compressed = compress(plan, report)
    with whole.step("learn") as report:
        file, learned = _learn(plan, report)
    if file is None:
        with whole.step("report") as report:
            found = prove_adapted(
                _control(plan), plan.materials["report"], plan.places.run / "report", plan.places.cache, report
            )
        return Outcome(None, learned, None, found, compressed)
    about = subject(plan, file)
    figures: dict[Split, Mapping[str, Any]] = {}
    for split in SPLITS:
        with whole.step(split) as report:
            folder, full = plan.places.run / split, split == "report"
            figures[split] = prove(about, plan.materials[split], folder, plan.places.cache, report, full=full)
    return Outcome(file, learned, figures["select"], figures["report"], compressed)


def subject(plan: Plan, file: PromptFile) -> Subject:
    """The prompt, with all that it is held against."""
    return Subject(file, _models(plan), plan.order.equal, _choice(plan) if plan.order.every else None)


def _control(plan: Plan) -> Control:
    """What was learned in a prompt's place."""
    folder = plan.places.run / "learn"
    learned = str(read_json(folder / CONFIG)["digest"])
    return Control(plan.order.kind, folder / ADAPTED_TENSORS, learned, _models(plan))


def _models(plan: Plan) -> Models:
    order, (model, level) = plan.order, plan.served
    return Models(model, level, order.dtype, order.device, plan.dense, None if plan.solve else order.base)


def _choice(plan: Plan) -> Choice:
    """Real texts from what is learned from, chosen on a part of what selects."""
    order, recipe, chosen = plan.order, plan.order.recipe, plan.materials["select"].sample
    texts = cut(plan.splits.parts["learn"], HubTokenizer(order.model), recipe.window)
    return Choice(texts, chosen.rows(0, min(len(chosen), recipe.select_windows), order.bos))


def compress(plan: Plan, report: Report) -> Mapping[str, Any]:
    """The packed checkpoint in its place, and what the solver told of it. Raises ModelError, RunError, DataError."""
    place = plan.places.checkpoint
    folder = place.with_name(f"{place.name}.run")
    if place.exists():
        return _compressed(plan, place, folder / FIGURES)
    order = _solver_order(plan)
    made = solver.planned(order)
    tokens, digest = None, None
    if made.recipe.method.calibrated:
        documents = plan.splits.parts["calibration"]
        tokens, digest = _calibration(order.source, documents, plan.order)
    with open_run(folder, made.config(digest), plan.order.seed) as run:
        manifest, sizes = solver.compress(made, tokens, run, report)
        run.tell(
            name=manifest.name,
            base=manifest.base,
            level=manifest.level,
            weights=manifest.weights,
            method=made.recipe.method.name,
            calibration_tokens=int(tokens.real.sum()) if tokens else 0,
            embedding=made.order.embedding,
            allocation=made.order.allocation,
            **{f"{name}_bytes": value for name, value in asdict(sizes).items()},
        )
        return dict(run.figures)


def _compressed(plan: Plan, place: Path, figures: Path) -> Mapping[str, Any]:
    """What is known of the checkpoint that is there; it must be the one that was asked for."""
    manifest = Manifest.read(place)
    if manifest is None or (manifest.base, manifest.level) != (plan.base, plan.order.level):
        found = "no checkpoint of ours" if manifest is None else f"{manifest.level} of base {manifest.base}"
        raise ModelError(f"{place} is {found}, asked for is {plan.order.level} of {plan.base}; name another --out")
    told = {"level": manifest.level, "weights": manifest.weights, "disk_bytes": info(place).disk_bytes}
    return {**(read_json(figures) if figures.exists() else {}), **told}


def _solver_order(plan: Plan) -> solver.Order:
    order = plan.order
    assert order.level is not None
    place = plan.places.checkpoint
    return solver.Order(
        order.model,
        place,
        order.level,
        order.method,
        embedding=order.embedding,
        device=order.device,
        allocation=order.allocation,
    )


def _calibration(model: Path, documents: Sequence[Document], order: Order) -> tuple[Tokens, str]:
    """The windows that the solver reads, and their digest."""
    windows = cut(documents, HubTokenizer(model), min(CALIBRATION_WINDOW, order.recipe.window))
    windows = windows.drawn(order.calibration, order.seed)
    return Tokens.of(windows.ids, windows.lengths), windows.digest


def _learn_order(plan: Plan) -> LearnOrder:
    order = plan.order
    model, level = plan.served
    return LearnOrder(
        model=model,
        level=level,
        kind=order.kind,
        task=order.task,
        recipe=order.recipe,
        budget=order.budget,
        dense=plan.dense,
        dtype=order.dtype,
        device=order.device,
        compute=order.compute,
        bos=order.bos,
        seed=order.seed,
        base=None if plan.solve else order.base,
    )


def _learn(plan: Plan, report: Report) -> tuple[PromptFile | None, Mapping[str, Any]]:
    """The prompt file is the last thing that is written: where it is, learning is over."""
    folder = plan.places.run / "learn"
    place = folder / PROMPT
    learning = plan.learning or planned_learning(_learn_order(plan), plan.splits)
    with open_run(folder, learning.record(), plan.order.seed) as run:
        if place.exists():
            return read_prompt(place), run.figures
        if _finished(run) and plan.order.kind not in ("rows", "kv"):
            return None, run.figures
        file, _ = learn(learning, run, plan.places.cache, report)
        if file is not None:
            write_bytes(place, encode_prompt(file))
        return file, run.figures


def _finished(run: Run) -> bool:
    return "best" in run.figures


def _materials(order: Order, splits: Splits, data: str) -> Mapping[Split, Material]:
    tokenizer, window = HubTokenizer(order.model), order.recipe.window
    found: dict[Split, Material] = {}
    for split in SPLITS:
        documents = tuple(splits.parts[split])
        drawn: Sample = sample(data, split, documents, tokenizer, window, [order.bos], most=order.windows)
        found[split] = Material(drawn, documents, window)
    return found
