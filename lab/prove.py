"""What a fresh prompt is worth: measured on one split to choose by, and on another that chose nothing.

A split is a run folder of its own, measured once; the figures are those of `promptstitch evaluate`, with the
measurement that the registry is told. Knows models, prompts and windows; knows no registry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lab.data.documents import Document, digest, form
from lab.data.windows import Windows
from lab.evaluate.conditions import Conditions, conditions, of_dense
from lab.evaluate.controls import Choice, by_frequency, untrained
from lab.evaluate.score import NotFiniteLoss, score
from lab.evaluate.scorer import Scorer
from lab.learn.forms import ADAPTED
from lab.learn.recipe import LearnError
from lab.progress import Report
from lab.run import open_run
from lab.transfer.cells import Cell, Place
from lab.transfer.prompts import Contender
from lab.transfer.samples import UNPROMPTED, Sample
from llama.identity import identify
from llama.load import LoadedModel, load
from llama.tokenizer import HubTokenizer
from prompts_store.file import PromptFile
from prompts_store.prompt import SoftPrompt
from prompts_store.records import Measurement


@dataclass(frozen=True)
class Models:
    """`model` at `level` (None: as stored) is what is served; `dense` the dense checkpoint, None where there is none;
    `base` that of a foreign `model`, as `llama.identity.identify` takes it."""

    model: Path
    level: str | None
    dtype: str
    device: str
    dense: Path | None = None
    base: str | None = None

    def load(self) -> LoadedModel:
        """What is served."""
        return load(self.model, level=self.level, base=self.base, dtype=self.dtype, device=self.device)

    def load_dense(self) -> LoadedModel | None:
        return load(self.dense, dtype=self.dtype, device=self.device) if self.dense else None

    @property
    def dense_weights(self) -> str | None:
        return identify(self.dense).weights if self.dense else None


@dataclass(frozen=True)
class Subject:
    """A prompt and the models that it is held against; `equal` is a prompt learned on the dense one at equal cost.

    `every`: with all controls, the best real text by this choice among them; else with the untrained prompt alone.
    `learned`: the documents that the prompt was learned from, for what a task costs by its answers' frequencies.
    """

    file: PromptFile
    models: Models
    equal: SoftPrompt | None = None
    every: Choice | None = None
    learned: tuple[Document, ...] = ()


@dataclass(frozen=True)
class Control:
    """What was learned in a prompt's place, `kind` lora or norms: its tensors in a file, and the digest of the run that
    `learned` them."""

    kind: str
    tensors: Path
    learned: str
    models: Models


@dataclass(frozen=True)
class Material:
    """A sample to measure on and the documents that it was cut from, in windows of so many text tokens."""

    sample: Sample
    documents: tuple[Document, ...]
    window: int


def prove(
    subject: Subject, material: Material, folder: Path, cache: Path | None, report: Report, *, full: bool = True
) -> Mapping[str, Any]:
    """The figures of one split, from the run folder if they are there already.

    Not `full`: the model with its prompt and without, which is all that choosing needs. Raises RunError, ModelError.
    """
    prompt, sample, models = subject.file.prompt, material.sample, subject.models
    windows = sample.rows(0, len(sample), prompt.bos)
    config = {
        "command": "evaluate" if full else "select",
        "prompt": prompt.digest,
        "weights": subject.file.provenance.weights,
        "data": windows.digest,
        "dense": models.dense_weights if full else None,
        "equal": subject.equal.digest if subject.equal else None,
        "controls": subject.every is not None,
        "dtype": models.dtype,
    }
    with open_run(folder, config) as run:
        if "measurement" not in run.figures:
            dense = None
            if full and (loaded := models.load_dense()):
                dense = of_dense(loaded, windows, report, cache=cache, equal=subject.equal, same=prompt)
                del loaded  # the model itself goes before the other comes
            served = models.load()
            tokenizer = HubTokenizer(models.model)
            choice = subject.every if full else None
            try:
                scorer = Scorer(served, cache)
                found = conditions(
                    scorer,
                    tokenizer,
                    windows,
                    prompt,
                    report,
                    dense=dense,
                    compare=True,
                    controls=choice is not None,
                    choice=choice,
                )
                if full and not choice:
                    idle = untrained(
                        served.model, prompt.base, prompt.num_virtual_tokens, kind=prompt.kind, bos=prompt.bos
                    )
                    found = replace(found, controls={"untrained": scorer(windows, idle, report)})
            except NotFiniteLoss as error:
                raise LearnError(str(error)) from error
            told = _told(subject, material, served, found) | floor(subject.learned, material, windows)
            run.tell(**found.told(), **told)
        return run.figures


def floor(learned: Sequence[Document], material: Material, windows: Windows) -> dict[str, Any]:
    """What the answers of a task that is scored in these windows cost by their frequencies; nothing of other data, or
    where answers are no choice among a few."""
    if form(material.documents) != "completion" or not learned:
        return {}
    asked = [material.documents[at] for at in sorted(set(windows.document.tolist()))]
    if (nats := by_frequency(learned, asked)) is None:
        return {}
    return {"by_frequency": {"perplexity": math.exp(nats / windows.scored_tokens), "nats_an_answer": nats / len(asked)}}


def prove_adapted(
    control: Control, material: Material, folder: Path, cache: Path | None, report: Report
) -> Mapping[str, Any]:
    """The figures of one split for what changes the model itself: the adapted model and the model, beside the dense
    one. Raises RunError, ModelError, LearnError."""
    windows = material.sample.rows(0, len(material.sample), UNPROMPTED)
    config = {
        "command": "control",
        "kind": control.kind,
        "learned": control.learned,
        "data": windows.digest,
        "dense": control.models.dense_weights,
        "dtype": control.models.dtype,
    }
    with open_run(folder, config) as run:
        if "perplexity" not in run.figures:
            dense = None
            if loaded := control.models.load_dense():
                dense = of_dense(loaded, windows, report, cache=cache)
                del loaded
            served = control.models.load()
            teacher = dense.teacher if dense else None
            try:
                plain = Scorer(served, cache)(windows, None, report, teacher)
                tensors = {name: tensor.to(served.model.device) for name, tensor in load_file(control.tensors).items()}
                adapted = ADAPTED[control.kind](served.model).adapted(tensors)
                main = score(adapted, windows, teacher=teacher, progress=report)
            except NotFiniteLoss as error:
                raise LearnError(str(error)) from error
            run.tell(**Conditions(main, plain, dense).told(), **_where(material, control.models, served, windows))
        return run.figures


def measurement(figures: Mapping[str, Any]) -> Measurement:
    """What the registry is told."""
    return Measurement(**figures["measurement"])


def _told(subject: Subject, material: Material, served: LoadedModel, found: Conditions) -> dict[str, Any]:
    prompt, sample = subject.file.prompt, material.sample
    return {
        **_where(material, subject.models, served, found.main.windows),
        "prompt_digest": prompt.digest,
        "prompt": {"kind": prompt.kind, "num_virtual_tokens": prompt.num_virtual_tokens, "bos": prompt.bos},
        "measurement": asdict(_cell(subject, sample, served, found).measurement()),
    }


def _where(material: Material, models: Models, served: LoadedModel, windows: Windows) -> Mapping[str, Any]:
    """On what and on which data."""
    who, sample = served.identity, material.sample
    return {
        "model": who.name,
        "level": who.level,
        "method": "while loading" if models.level else None,  # of a checkpoint, its own run says it
        "base": who.base,
        "weights": who.weights,
        "dtype": str(served.model.dtype).removeprefix("torch."),
        "device": str(served.model.device),
        "bytes": served.resident_bytes,
        "disk_bytes": served.disk_bytes,
        "text": {
            "source": sample.data,
            "digest": digest(material.documents),
            "form": form(material.documents),
            "documents": len(set(windows.document.tolist())),
        },
        "split": sample.split,
        "window": material.window,
        "windows": len(sample),
    }


def _cell(subject: Subject, sample: Sample, served: LoadedModel, found: Conditions) -> Cell:
    """As a table of transfer has it, so that both tell the registry the same of the same windows."""
    assert found.plain is not None
    who, origin = served.identity, subject.file.provenance
    place = Place(who.name, who.level, who.weights, served.disk_bytes, served.resident_bytes)
    contender = Contender(subject.file.prompt, "new", origin.task, None, origin.level, origin.weights)
    windows, places = sample.first(len(sample))
    without, behind = (scores.nll.double().sum(1)[places] for scores in (found.plain, found.main))
    return Cell(place, contender, sample.data, sample.split, windows, without, behind)
