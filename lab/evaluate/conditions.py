"""One model on one set of windows in every condition that a claim needs: with its prompt, without, dense, controls.

Knows models, prompts and windows; knows no files but the teacher's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.data.windows import Tokenizer, Windows
from lab.evaluate.bootstrap import by_document, difference, estimate
from lab.evaluate.controls import Choice, best_prefix, fixed
from lab.evaluate.recovery import recovery
from lab.evaluate.score import Progress, Scores, Teacher
from lab.evaluate.scorer import Scorer
from lab.evaluate.teacher import teacher
from llama.load import LoadedModel
from prompts_store.prompt import SoftPrompt


@dataclass(frozen=True)
class Dense:
    """What the dense model says of the windows; its blocks are no longer needed."""

    teacher: Teacher
    scores: Scores
    with_prompt: Scores | None = None  # behind a prompt learned on the dense model
    with_same: Scores | None = None  # behind the very prompt that is evaluated


@dataclass(frozen=True)
class Conditions:
    """Scores of the same windows. `main` is the model as asked for; those that need a prompt are None without one."""

    main: Scores
    plain: Scores | None = None
    dense: Dense | None = None
    controls: Mapping[str, Scores] = field(default_factory=dict)

    def told(self, seed: int = 0) -> dict[str, Any]:
        """As JSON: the sums, means in nats with intervals, and how the conditions compare."""
        windows = self.main.windows
        told: dict[str, Any] = {
            "perplexity": self.main.perplexity,
            "nll_sum": self.main.nll_sum,
            "scored_tokens": windows.scored_tokens,
            "nll": estimate(by_document([self.main.nll], windows), lambda m: m[0], seed=seed).told(),
        }
        others = {"without_prompt": self.plain, **self.controls}
        if self.dense:
            told |= self._beside_dense(self.dense, seed)
            others["same_prompt_on_dense"] = self.dense.with_same
        if self.plain:
            told["gain"] = difference(self.plain.nll, self.main.nll, windows, seed=seed).told()
            told["conditions"] = {name: self._beside(each, seed) for name, each in others.items() if each}
        return told

    def _beside(self, other: Scores, seed: int) -> dict[str, Any]:
        above = difference(other.nll, self.main.nll, self.main.windows, seed=seed)
        return {"perplexity": other.perplexity, "nll_above_ours": above.told()}

    def _beside_dense(self, dense: Dense, seed: int) -> dict[str, Any]:
        windows = self.main.windows
        assert self.main.kl is not None
        assert self.main.agrees is not None
        paired = by_document([self.main.kl, self.main.agrees], windows)
        told: dict[str, Any] = {
            "dense_perplexity": dense.scores.perplexity,
            "nll_above_dense": difference(self.main.nll, dense.scores.nll, windows, seed=seed).told(),
            "kl": estimate(paired, lambda m: m[0], seed=seed).told(),
            "top1_agreement": estimate(paired, lambda m: m[1], seed=seed).told(),
        }
        if dense.with_prompt:
            told["dense_prompted_perplexity"] = dense.with_prompt.perplexity
        if self.plain:
            told["recovery"] = recovery(dense.scores, self.plain, self.main, dense.with_prompt, seed=seed).told()
        return told


def of_dense(
    dense: LoadedModel,
    windows: Windows,
    progress: Progress,
    *,
    cache: Path | None = None,
    equal: SoftPrompt | None = None,
    same: SoftPrompt | None = None,
) -> Dense:
    """The dense model's part; `equal` is a prompt learned on it at equal cost, `same` the one that is evaluated.

    `cache` keeps its states and scores.
    """
    taught, scorer = teacher(dense, windows, cache=cache, progress=progress), Scorer(dense, cache)

    def behind(prompt: SoftPrompt | None) -> Scores | None:
        return scorer(windows, prompt, progress) if prompt else None

    return Dense(taught, taught.scores(), behind(equal), behind(same))


def conditions(
    scorer: Scorer,
    tokenizer: Tokenizer,
    windows: Windows,
    prompt: SoftPrompt | None,
    progress: Progress,
    *,
    dense: Dense | None = None,
    compare: bool = False,
    controls: bool = False,
    choice: Choice | None = None,
) -> Conditions:
    """Score the model; `compare` also without its prompt, `controls` also behind prompts that nobody learned, with the
    best of real texts among them where a `choice` is given and holds one so long. Raises NotFiniteLoss.
    """

    def behind(prompt: SoftPrompt | None) -> Scores:
        return scorer(windows, prompt, progress, dense.teacher if dense else None)

    others = dict(fixed(scorer.loaded.model, tokenizer, prompt)) if prompt and controls else {}
    if prompt and choice and (best := best_prefix(scorer, prompt, choice, progress)[0]):
        others["best_text"] = best
    return Conditions(
        main=behind(prompt),
        plain=behind(None) if prompt and (compare or controls) else None,
        dense=dense,
        controls={name: scorer(windows, other, progress) for name, other in others.items()},
    )
