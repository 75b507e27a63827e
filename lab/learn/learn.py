"""One run from its plan to what came out: the dense model's states, the loop, the prompt with its golden self-test.

At most one whole model is held at a time. Knows files of prompts; knows no command line.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from engine.device import select
from lab.data.windows import Windows, windows
from lab.disk import saving, write_file
from lab.evaluate.score import Teacher, score
from lab.evaluate.teacher import teacher
from lab.learn.budget import pool, steps_in, steps_of
from lab.learn.compute import for_learning
from lab.learn.forms import Form, LoraForm, NormForm, PromptForm
from lab.learn.loop import Learned, Learner, Lesson
from lab.learn.order import Plan
from lab.learn.recipe import LearnError
from lab.learn.start import Start, start
from lab.progress import Report, silent
from lab.run import Run, config_digest, open_run
from llama.load import LoadedModel, load
from llama.model import Llama
from llama.tokenizer import HubTokenizer
from prompts_store.file import PromptFile, Provenance
from prompts_store.golden import RECOMMENDED_IDS, Golden
from prompts_store.prompt import SoftPrompt

ADAPTED_TENSORS = "adapted.safetensors"


def learn(plan: Plan, run: Run, cache: Path | None, report: Report) -> tuple[PromptFile | None, Mapping[str, Any]]:
    """The prompt, None for a control, whose tensors stay in the run folder; and the figures, which go there, too.

    `cache` is the folder of dense models' states. Raises LearnError, RunError, ModelError; what the run folder holds
    is then intact, and the same plan goes on from it.
    """
    select(plan.device)
    steps, selections = _length(plan, run, report)
    recipe = replace(plan.order.recipe, selections=selections)
    drawn = plan.learn.select(torch.arange(pool(steps, plan.learn, recipe)))
    lessons = _lessons(plan, drawn, cache, report)
    loaded = _served(plan, prepare=False)
    model = for_learning(loaded.model, plan.compute)
    form, begun = _form(plan, model)
    learner = Learner(form, model.head, begun.tensors, *lessons, recipe, steps, run)
    learned = learner.run(report)
    figures = _figures(plan, learned, run, steps, begun)
    del learner, form, model, loaded
    file = None
    if plan.order.kind in ("rows", "kv"):
        file = _file(plan, learned, begun, run, report)
        figures |= {
            "digest": file.prompt.digest,
            "golden": asdict(file.provenance.golden) if file.provenance.golden else None,
        }
    else:
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in learned.tensors.items()}
        with saving(run.folder / ADAPTED_TENSORS):
            write_file(run.folder / ADAPTED_TENSORS, lambda part: save_file(tensors, part))
    run.tell(**figures)
    return file, figures


def _length(plan: Plan, run: Run, report: Report) -> tuple[int, int]:
    """Steps and selections: as the run folder says, else as the budget comes to, which is then written there."""
    budget, recipe = plan.order.budget, plan.order.recipe
    if (told := run.figures.get("plan")) is not None:
        return int(told["steps"]), int(told["selections"])
    measured = {}
    if budget.unit == "seconds":
        step, selection = _measured(plan, report)
        steps, selections = steps_in(budget.amount, step, selection, recipe)
        measured = {"step_seconds": round(step, 3), "selection_seconds": round(selection, 3)}
    else:
        steps, selections = steps_of(budget, plan.learn, recipe), recipe.selections
    run.tell(plan={"steps": steps, "selections": selections, **measured})
    return steps, selections


def _measured(plan: Plan, report: Report) -> tuple[float, float]:
    """Seconds of a step and of a selection. In place of the dense model's states stand zeros, which cost the same."""
    report("measure speed", 0, 0)
    model = for_learning(_served(plan, prepare=False).model, plan.compute)
    form, begun = _form(plan, model)

    def lesson(few: Windows) -> Lesson:
        if plan.dense is None:
            return Lesson(few)
        states = torch.zeros(few.scored_tokens, plan.config.hidden_size, dtype=model.dtype)
        return Lesson(few, Teacher(few, states, model.head))

    recipe = plan.order.recipe
    some = lesson(plan.learn.select(torch.arange(min(len(plan.learn), recipe.batch))))
    chosen = plan.select.select(torch.arange(min(len(plan.select), recipe.batch)))
    with TemporaryDirectory(prefix="promptstitch-") as folder, open_run(Path(folder), {}) as scratch:
        learner = Learner(form, model.head, begun.tensors, some, lesson(chosen), recipe, 3, scratch)
        learner.select(silent)
        return min(_seconds(learner.step) for _ in range(3)), _seconds(lambda: learner.select(silent)) * (
            len(plan.select) / len(chosen)
        )


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _lessons(plan: Plan, drawn: Windows, cache: Path | None, report: Report) -> tuple[Lesson, Lesson]:
    """Windows to learn from and to select on, with the dense model's states if the recipe distils."""
    if plan.dense is None:
        return Lesson(drawn), Lesson(plan.select)
    folder, identity = plan.dense
    dense = load(folder, dtype=plan.dtype, device=str(plan.device))
    assert dense.identity == identity
    return tuple(  # type: ignore[return-value]
        Lesson(part, teacher(dense, part, cache=cache, progress=report)) for part in (drawn, plan.select)
    )


def _served(plan: Plan, prepare: bool) -> LoadedModel:
    """The model that will be served."""
    order = plan.order
    return load(
        order.model, level=order.level, base=order.base, dtype=plan.dtype, device=str(plan.device), prepare=prepare
    )


def _form(plan: Plan, model: Llama) -> tuple[Form, Start]:
    order, recipe = plan.order, plan.order.recipe
    if order.kind == "lora":
        return LoraForm(model, recipe.recompute), Start(LoraForm.start(model, recipe.positions, order.seed))
    if order.kind == "norms":
        return NormForm(model, recipe.recompute), Start(NormForm.start(model))
    tokenizer = HubTokenizer(order.model)
    begun = start(order.kind, recipe.init, recipe.positions, plan.parent, model, tokenizer, order.seed)
    return PromptForm(model, recipe.positions, recipe.recompute), begun


def _figures(plan: Plan, learned: Learned, run: Run, steps: int, begun: Start) -> dict[str, Any]:
    last = run.events("step")[-1]
    on_device = torch.cuda.max_memory_allocated() if plan.device.type == "cuda" else None
    return {
        "kind": plan.order.kind,
        "task": plan.order.task,
        "base": plan.identity.base,
        "level": plan.identity.level,
        "weights": plan.identity.weights,
        "parameters": sum(tensor.numel() for tensor in begun.tensors.values()),
        "steps": steps,
        "tokens": learned.tokens,
        "documents_left_out": plan.learn.left_out,
        "seconds": last["seconds"],
        "tokens_per_second": round(learned.tokens / max(last["seconds"], 1e-9), 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": on_device,
        "first": asdict(learned.first),
        "best": asdict(learned.best),
    }


def _file(plan: Plan, learned: Learned, begun: Start, run: Run, report: Report) -> PromptFile:
    """The prompt with where it comes from. Raises LearnError where the served model could not take it."""
    order = plan.order
    assert order.kind in ("rows", "kv")
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in learned.tensors.items()}
    prompt = SoftPrompt(order.kind, plan.identity.base, tensors, order.bos, plan.chat_template)
    served = _served(plan, prepare=True)
    if not all(bool(tensor.to(served.model.dtype).isfinite().all()) for tensor in tensors.values()):
        raise LearnError(f"what was learned is not finite in {plan.dtype}, which is served; lower lr, in another --run")
    report("golden self-test", 0, 0)
    created = run.figures.get("created") or datetime.now(UTC).isoformat(timespec="seconds")
    run.tell(created=created)
    train = {
        "method": "learn",
        **order.recipe.told(),
        "seed": order.seed,
        "steps": learned.steps,
        "tokens_seen": learned.tokens,
        "best_step": learned.best.step,
        "loss": round(learned.best.loss, 5),
        "cross_entropy": round(learned.best.cross_entropy, 5),
        "divergence": None if learned.best.divergence is None else round(learned.best.divergence, 5),
        "data": plan.data,
        "dense": plan.dense[1].weights if plan.dense else None,
        "parents": list(begun.parents),
        "compute": plan.compute,
        "dtype": plan.dtype,
        "run": config_digest(run.config),
    }
    train["init"] = order.recipe.init[:1024] if not begun.parents else "prompt"
    provenance = Provenance(
        order.task,
        plan.identity.level,
        plan.identity.weights,
        train,
        created,
        golden(served.model, prompt, plan.select),
    )
    return PromptFile(prompt, provenance)


def golden(model: Llama, prompt: SoftPrompt, select: Windows) -> Golden:
    """The first tokens of the first selection window, and their mean loss behind the prompt in this very model."""
    ids = select.ids[:1, : min(RECOMMENDED_IDS, int(select.lengths[0]))]
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    found = score(model, windows(ids, scored, torch.zeros(1, dtype=torch.int64)), prompt)
    return Golden(tuple(ids[0].tolist()), found.nll_sum / found.windows.scored_tokens)
