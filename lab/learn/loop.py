"""The learning loop: steps, selection, and a state from which a killed run goes on to the same bits.

Everything that a step depends on is in the state or a function of seed and step, so how often a state is saved changes
nothing. On CUDA, where fused attention adds its slopes up in any order, the last bits may differ all the same. Knows
forms, windows and losses; knows no file format, no command and no clock beyond when to save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from lab.data.windows import Windows
from lab.evaluate.score import Teacher
from lab.learn.batches import Batches, positions_at
from lab.learn.forms import Form
from lab.learn.losses import Loss, Target, chunked_loss
from lab.learn.recipe import LearnError, Recipe
from lab.progress import Report
from lab.run import Run, State
from llama.linear import Linear

SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Lesson:
    """Windows, and the dense model's view of them if the recipe distils."""

    windows: Windows
    teacher: Teacher | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Means per token on the selection windows after `step` steps; `loss` is the recipe's mix, which decides."""

    step: int
    loss: float
    cross_entropy: float
    divergence: float | None


@dataclass(frozen=True)
class Learned:
    """What came out: the tensors of the best selection, and how it went. `first` is the selection before any step."""

    tensors: Mapping[str, Tensor]
    best: Selection
    first: Selection
    steps: int
    tokens: int


@dataclass
class _Standing:
    """What a state holds besides tensors."""

    step: int = 0
    tokens: int = 0  # text tokens that went through, scored or not
    seconds: float = 0.0
    selections: list[Selection] = field(default_factory=list)
    best: int = 0  # number of the selection


class Learner:
    """One run of `steps` steps over what `start` holds, taken up where the run folder's state stands."""

    def __init__(
        self,
        form: Form,
        head: Linear,
        start: Mapping[str, Tensor],
        learn: Lesson,
        select: Lesson,
        recipe: Recipe,
        steps: int,
        run: Run,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        self._form, self._head, self._recipe, self._steps, self._run = form, head, recipe, steps, run
        self._learn, self._select, self._save_seconds = learn, select, save_seconds
        device = next(head.parameters(), next(head.buffers(), torch.empty(0))).device
        self.tensors = {name: torch.nn.Parameter(t.detach().to(device).clone()) for name, t in start.items()}
        self._average = {name: torch.zeros_like(t) for name, t in self.tensors.items()}
        self._best = {name: t.detach().clone() for name, t in self.tensors.items()}
        self._optimiser = torch.optim.AdamW(
            self.tensors.values(),
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
            foreach=False,
        )
        self._batches = Batches(len(learn.windows), recipe.batch, run.seed)
        self._at = _Standing()
        self._restore(run.load())

    def run(self, report: Report) -> Learned:
        """Learn to the end. Raises LearnError for a loss that is not finite, RunError for a full disk."""
        if not self._at.selections:
            self.select(report)
            self._save()
        saved = time.monotonic()
        marks = {math.ceil(k * self._steps / self._recipe.selections) for k in range(1, self._recipe.selections + 1)}
        while self._at.step < self._steps:
            loss = self.step()
            report(f"learn, loss {loss:.3f}, selected {self.best.loss:.3f}", self._at.step, self._steps)
            if self._at.step in marks:
                self.select(report)
            if self._at.step in marks or time.monotonic() - saved > self._save_seconds:
                self._save()
                saved = time.monotonic()
        return Learned(self._best, self.best, self._at.selections[0], self._at.step, self._at.tokens)

    @property
    def best(self) -> Selection:
        """The selection with the lowest loss so far."""
        return self._at.selections[self._at.best]

    def step(self) -> float:
        """One step of the optimiser; the mean loss of its tokens before it. Raises LearnError."""
        began, at, recipe = time.monotonic(), self._at, self._recipe
        rate = recipe.lr * recipe.factor(at.step, self._steps)
        n = positions_at(at.step, self._form.positions, recipe.nested, self._run.seed)
        rows = self._batches.at(at.step)
        scored = int(self._learn.windows.scored[rows].sum())
        self._optimiser.zero_grad(set_to_none=True)
        parts = []
        for few in torch.split(rows, recipe.micro or len(rows)):
            part = self._loss(self._learn, few, self.tensors, n)
            (part.total / scored).backward()  # type: ignore[no-untyped-call]
            parts.append(replace(part, total=part.total.detach()))
        loss = sum(float(part.total) for part in parts) / scored
        norm = torch.nn.utils.clip_grad_norm_(self.tensors.values(), recipe.clip or math.inf, foreach=False)
        self._check_finite(loss, float(norm), rate)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._average_in()
        at.step, at.tokens = at.step + 1, at.tokens + int(self._learn.windows.lengths[rows].sum())
        at.seconds += time.monotonic() - began
        self._log_step(parts, scored, loss, float(norm), rate, n)
        return loss

    @torch.no_grad()
    def select(self, report: Report) -> Selection:
        """Measure what would be kept now on the selection windows, and keep it if nothing before was better."""
        tensors, windows = self._averaged(), self._select.windows
        sums, divergence, scored = [0.0, 0.0], 0.0, windows.scored_tokens
        for rows in torch.split(torch.arange(len(windows)), self._recipe.micro or self._recipe.batch):
            part = self._loss(self._select, rows, tensors, self._form.positions)
            sums[0] += float(part.total)
            sums[1] += part.cross_entropy
            divergence += part.divergence or 0.0
            report("select", int(rows[-1]) + 1, len(windows))
        distilled = None if self._select.teacher is None else divergence / scored
        found = Selection(self._at.step, sums[0] / scored, sums[1] / scored, distilled)
        if not math.isfinite(found.loss):
            raise LearnError(f"the loss on the selection windows is {found.loss}; lower lr, now {self._recipe.lr:g}")
        self._at.selections.append(found)
        self._run.log("select", **asdict(found))
        if found.loss <= self.best.loss:
            self._at.best = len(self._at.selections) - 1
            self._best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return found

    def _loss(self, lesson: Lesson, rows: Tensor, tensors: Mapping[str, Tensor], n: int) -> Loss:
        """Of the scored tokens of these windows (their numbers), behind the first n positions."""
        windows = lesson.windows
        width = max(2, int(windows.lengths[rows].max()))
        ids, scored = windows.ids[rows, :width], windows.scored[rows, 1:width]
        hidden = self._form.hidden(tensors, ids[:, :-1], n)  # the last token predicts nothing
        hidden = hidden[scored.to(hidden.device)]
        states = head = None
        if lesson.teacher is not None:
            states, head = lesson.teacher.hidden(rows), lesson.teacher.head
        return chunked_loss(hidden, self._head, Target(ids[:, 1:][scored], states, head, self._recipe.distil))

    def _check_finite(self, loss: float, norm: float, rate: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            raise LearnError(
                f"step {self._at.step}: the {what} at lr {rate:.3g}. Lower lr or clip, lengthen warmup, or compute in "
                f"float32, in another --run; the state before it is intact in {self._run.folder}"
            )

    def _average_in(self) -> None:
        decay = self._recipe.ema
        for name, tensor in self.tensors.items():
            self._average[name].mul_(decay).add_(tensor.detach(), alpha=1 - decay)

    def _averaged(self) -> dict[str, Tensor]:
        """The average, without the zeros that it began with; the tensors themselves if nothing is averaged."""
        weight = 1 - self._recipe.ema**self._at.step
        if not self._recipe.ema or not self._at.step:
            return {name: tensor.detach() for name, tensor in self.tensors.items()}
        return {name: tensor / weight for name, tensor in self._average.items()}

    def _log_step(self, parts: list[Loss], scored: int, loss: float, norm: float, rate: float, n: int) -> None:
        divergences = [part.divergence for part in parts if part.divergence is not None]
        self._run.log(
            "step",
            step=self._at.step,
            loss=loss,
            cross_entropy=sum(part.cross_entropy for part in parts) / scored,
            divergence=sum(divergences) / scored if divergences else None,
            gradient=norm,
            lr=rate,
            positions=n,
            tokens=self._at.tokens,
            seconds=round(self._at.seconds, 2),
        )

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.tensors.items():
            tensors |= {f"now.{name}": parameter, f"average.{name}": self._average[name]}
            tensors[f"best.{name}"] = self._best[name]
            for moment, value in self._optimiser.state.get(parameter, {}).items():
                tensors[f"{moment}.{name}"] = value
        self._run.save(State(tensors, asdict(self._at)))

    @torch.no_grad()
    def _restore(self, state: State | None) -> None:
        if state is None:
            return
        selections = [Selection(**each) for each in state.values["selections"]]
        self._at = _Standing(**{**state.values, "selections": selections})
        for name, parameter in self.tensors.items():
            parameter.copy_(state.tensors[f"now.{name}"])
            self._average[name].copy_(state.tensors[f"average.{name}"])
            self._best[name].copy_(state.tensors[f"best.{name}"])
            moments = ("step", "exp_avg", "exp_avg_sq")
            if f"step.{name}" in state.tensors:
                held = {moment: state.tensors[f"{moment}.{name}"] for moment in moments}
                on = {m: t if m == "step" else t.to(parameter.device) for m, t in held.items()}
                self._optimiser.state[parameter] = on
