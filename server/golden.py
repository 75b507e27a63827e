"""Golden self-tests: whether what is served here computes what a prompt's maker saw. Each is run once.

The loss comes from the engine that answers everyone else, by a request like any other. Knows no tensors and no routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from engine.api import Engine, EngineInfo
from engine.score import mean_loss
from prompts_store.errors import GoldenMismatch, InvalidArtifact
from prompts_store.file import PromptFile
from prompts_store.golden import Golden
from prompts_store.prompt import SoftPrompt
from prompts_store.records import Version

REMEMBERED = 4096
OTHER_WEIGHTS = "other weights are served than those that it was learned through"
NOT_LOADED = "the prompt has not been loaded since this server started"


class GoldenTests:
    """Tests and the losses that they found. Thread-safe: at worst one is run twice.

    All that run a test block until the engine has answered, and raise EngineError or ScoringFailed where it does not.
    """

    def __init__(self, count: Callable[[str], None] = lambda result: None) -> None:
        """`count` is told `ok` or `mismatch` of each test that is run."""
        self._count = count
        self._found: dict[tuple[str, Golden], float] = {}  # digest and test -> loss

    def accept(self, engine: Engine, file: PromptFile) -> None:
        """Test a file on its way in. Raises InvalidArtifact."""
        origin = file.provenance
        try:
            self._check(engine, file.prompt, origin.level, origin.weights, origin.golden)
        except GoldenMismatch as error:
            raise InvalidArtifact(error.code, error.message, "golden") from error

    def check(self, engine: Engine, prompt: SoftPrompt, version: Version) -> None:
        """Test a stored version that is about to be served. Raises GoldenMismatch."""
        self._check(engine, prompt, version.level, version.weights, version.golden)

    def told(self, version: Version, info: EngineInfo | None) -> dict[str, Any] | None:
        """The `golden` field of a version; `info` is None while nothing is served."""
        if version.golden is None:
            return None
        why = not_checked(version.weights, version.golden, version.num_virtual_tokens, info)
        found = self._found.get((version.digest, version.golden))
        if why and not _compared(why, version.level, info):
            found = None
        return outcome(version.golden, found, why or (NOT_LOADED if found is None else None))

    def _check(
        self, engine: Engine, prompt: SoftPrompt, level: str | None, weights: str | None, golden: Golden | None
    ) -> None:
        """On other weights of the same level the test is run and told, and holds nothing up."""
        if golden is None:
            return
        why = not_checked(weights, golden, prompt.num_virtual_tokens, engine.info)
        beyond = max(golden.ids) >= engine.info.vocab_size
        if why and (beyond or not _compared(why, level, engine.info)):
            return
        if beyond:
            raise GoldenMismatch(f"the golden self-test has the id {max(golden.ids)}, beyond the served vocabulary")
        found = self._found.get((prompt.digest, golden))
        if found is None:
            found = mean_loss(engine, golden.ids, prompt)
            if len(self._found) >= REMEMBERED:
                self._found.clear()
            self._found[prompt.digest, golden] = found
            if not why:
                self._count("ok" if golden.agrees(found) else "mismatch")
        if not why and not golden.agrees(found):
            raise GoldenMismatch(
                f"the golden self-test expects a loss of {golden.loss:.4f} nats per token and found {found:.4f}, more "
                f"than {golden.tolerance:.4f} off. The weights are those that the prompt was learned through, so it is "
                "something else that differs: the layout of its ids, the dtype, or the arithmetic of this machine"
            )


def outcome(golden: Golden, found: float | None, why: str | None) -> dict[str, Any]:
    """What is told of a test: `why` it was not run, or was run on weights that it does not judge."""
    shown = found if found is not None and math.isfinite(found) else None
    ok = None if why or found is None else golden.agrees(found)
    return {"expected": golden.loss, "found": shown, "ok": ok, "not_checked": why}


def _compared(why: str, level: str | None, info: EngineInfo | None) -> bool:
    """Whether what is served is another compression to the level that the prompt was learned at: then the test tells
    how far apart the two are."""
    return why == OTHER_WEIGHTS and info is not None and level == info.level


def not_checked(weights: str | None, golden: Golden, soft_tokens: int, info: EngineInfo | None) -> str | None:
    """Why a prompt's self-test says nothing about what is served, or None where it does."""
    if info is None:
        return "no model is served here"
    if weights is None:
        return "the prompt does not say which weights it was learned through"
    if soft_tokens + len(golden.ids) > info.max_model_len:
        return f"prompt and test do not fit into the served context of {info.max_model_len}"
    return None if weights == info.weights else OTHER_WEIGHTS
