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
from lab.learn.learn import ADAPTED_TENSORS, learn
from lab.learn.order import Order as LearnOrder
from lab.learn.order import planned as planned_learning
from lab.learn.recipe import LearnError
from lab.plan import Order, Places, Plan
from lab.progress import Report
from lab.prove import Control, Material, Models, Subject, measurement, prove, prove_adapted
from lab.run import CONFIG, Run, open_run
from lab.transfer.samples import SPLITS, Sample, Split, sample
from lab.whole import Whole
from llama.errors import ModelError
from llama.formats import LOAD_LEVELS
from llama.identity import identify
from llama.shards import read_json
from llama.tokenizer import HubTokenizer
from prompts_store.file import PromptFile, encode_prompt, read_prompt
from prompts_store.records import Measurement

PROMPT = "prompt.safetensors"
CALIBRATION_WINDOW = 256


@dataclass(frozen=True)
class Outcome:
    """The prompt (None for a control, which chooses nothing either) and the figures of each step."""

    file: PromptFile | None
    learned: Mapping[str, Any]
    select: Mapping[str, Any] | None
    report: Mapping[str, Any] | None
    compressed: Mapping[str, Any] | None


def planned(order: Order, splits: Splits, places: Places, data: str, shared: Splits | None = None) -> Plan:
    """Everything that can be found wrong before a weight is read is found here. `data` is what the data is called,
    `shared` as in Plan.

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
    if order.dense is not None:
        _check_dense(order.dense, stored.base)
    solve = order.level is not None and (order.method is not None or order.level not in LOAD_LEVELS)
    for name, asked, usual in (("embedding", order.embedding, "keep"), ("allocation", order.allocation, "uniform")):
        if asked != usual and not solve:
            raise LearnError(
                f"{name} is {asked!r}, but {order.level or 'the model'} is made while loading and writes no "
                "checkpoint; name a method, --method gptq"
            )
    if solve and not (shared or splits).parts["calibration"]:
        raise DataError("no document is left to calibrate on; give more documents, of more sites")
    plan = Plan(order, places, splits, _materials(order, splits, data), solve, stored.base, stored.weights, shared)
    if solve and not places.checkpoint.exists():
        solver.planned(_solver_order(plan))
        tried = replace(order.recipe, distil=0.0)
        planned_learning(replace(_learn_order(plan), model=order.model, level=None, dense=None, recipe=tried), splits)
        return plan
    return replace(plan, learning=planned_learning(_learn_order(plan), splits))


def _check_dense(place: Path, base: str) -> None:
    other = identify(place)
    if other.level != "dense":
        raise ModelError(f"--dense {place} is {other.level}; name the dense checkpoint that the model was made from")
    if other.base != base:
        raise ModelError(
            f"--dense {place} is of base {other.base}, the model of {base}; name the dense checkpoint that the model "
            "was made from, or say that it is (--base)"
        )


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


def rival(plan: Plan, file: PromptFile, report: Report) -> Measurement:
    """What another prompt is worth on what this plan selects by. Raises RunError, ModelError."""
    folder = plan.places.run / f"select-{file.prompt.digest.removeprefix('sha256:')[:12]}"
    about = Subject(file, _models(plan))
    return measurement(prove(about, plan.materials["select"], folder, plan.places.cache, report, full=False))


def subject(plan: Plan, file: PromptFile) -> Subject:
    """The prompt, with all that it is held against."""
    every = _choice(plan) if plan.order.every else None
    return Subject(file, _models(plan), plan.order.equal, every, tuple(plan.splits.parts["learn"]))


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
    """The packed checkpoint in its place, and what the solver told of it. One that is there already is taken if its
    run folder says that it was made just as it is asked for. Raises ModelError, RunError, DataError."""
    place = plan.places.checkpoint
    folder = place.with_name(f"{place.name}.run")
    if place.exists() and not folder.exists():
        raise ModelError(
            f"{place} is there, but not {folder}, which would say how it was made; name another --out, or recover it "
            "as it is: its folder in place of the dense model, without --level, and --dense"
        )
    order = _solver_order(plan)
    made = solver.planned(order)
    seed = 0 if plan.shared else plan.order.seed
    tokens, digest = None, None
    if made.recipe.method.calibrated:
        documents = (plan.shared or plan.splits).parts["calibration"]
        tokens, digest = _calibration(order.source, documents, plan.order, seed)
    with open_run(folder, made.config(digest), seed) as run:
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


def _calibration(model: Path, documents: Sequence[Document], order: Order, seed: int) -> tuple[Tokens, str]:
    """The windows that the solver reads, and their digest."""
    windows = cut(documents, HubTokenizer(model), min(CALIBRATION_WINDOW, order.recipe.window))
    windows = windows.drawn(order.calibration, seed)
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
