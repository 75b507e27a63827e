"""What a run has scored so far: the summed loss of each window, by model, data and prompt, in the run's state.

A slice that is in the ledger is never scored again, whatever was killed since. Knows run folders; knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.run import Run, State
from lab.transfer.cells import Place
from lab.transfer.samples import Sample
from prompts_store.prompt import SoftPrompt

NOTHING = torch.zeros(0, dtype=torch.float64)


class Ledger:
    """Belongs to an open run; saved with every entry."""

    def __init__(self, run: Run) -> None:
        state = run.load() or State({}, {"places": {}, "misfits": {}})
        self._run = run
        self._sums = dict(state.tensors)
        self._values: dict[str, Any] = dict(state.values)

    @property
    def windows(self) -> int:
        """How many were scored, over all models, data and prompts."""
        return sum(map(len, self._sums.values()))

    def sums(self, weights: str, sample: Sample, prompt: SoftPrompt | None) -> Tensor:
        """(w,) fp64 nats of the sample's first w windows behind the prompt, or behind none."""
        return self._sums.get(_key(weights, sample, prompt), NOTHING)

    def add(self, weights: str, sample: Sample, prompt: SoftPrompt | None, sums: Tensor) -> None:
        """The sums (n,) of its next n windows. Raises RunError."""
        key = _key(weights, sample, prompt)
        self._sums[key] = torch.cat((self._sums.get(key, NOTHING), sums.double()))
        self._save()

    def place(self, weights: str) -> Place | None:
        """The model of these weights, if it was loaded before."""
        told = self._values["places"].get(weights)
        return None if told is None else Place(**told)

    def put_place(self, place: Place, misfits: dict[str, str]) -> None:
        """A model, and why some prompts (by digest) do not fit it. Raises RunError."""
        names = ("name", "level", "weights", "disk_bytes", "resident_bytes")
        self._values["places"][place.weights] = {name: getattr(place, name) for name in names}
        self._values["misfits"][place.weights] = misfits
        self._save()

    def put_misfit(self, weights: str, digest: str, why: str) -> None:
        """A prompt that turned out not to fit this model. Raises RunError."""
        self._values["misfits"][weights] = {**self.misfits(weights), digest: why}
        self._save()

    def misfits(self, weights: str) -> dict[str, str]:
        """Why some prompts do not fit this model, by digest."""
        return dict(self._values["misfits"].get(weights, {}))

    def _save(self) -> None:
        self._run.save(State(self._sums, self._values))


def _key(weights: str, sample: Sample, prompt: SoftPrompt | None) -> str:
    return f"{weights} {sample.data} {sample.split} {'none' if prompt is None else prompt.digest}"
