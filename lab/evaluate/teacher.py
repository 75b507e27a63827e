"""The dense model's last hidden states of windows, computed once and kept in a file for every level and every seed.

A file belongs to (weights, dtype, windows) and is mapped, not read: 2 H bytes a scored token on disk. One that was cut
off by a kill goes on where it stopped. Knows the dense model; knows no prompt.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from lab.data.windows import Windows
from lab.errors import RunError
from lab.evaluate.score import Progress, Teacher, batches, predicting
from llama.load import LoadedModel
from llama.model import Llama


def teacher(
    dense: LoadedModel, windows: Windows, *, cache: Path | None = None, progress: Progress | None = None
) -> Teacher:
    """The dense model as a teacher for these windows; with `cache`, its states come from a file there or go into one.

    Kept states are rounded to 16 bits where the model computes in fp32. Only the head of the model stays referenced.
    Raises RunError where the file cannot be written.
    """
    model, report = dense.model, progress or (lambda step, done, total: None)
    if cache is None:
        states = torch.empty(windows.scored_tokens, model.config.hidden_size, dtype=model.dtype)
        at = 0
        for part in _states(model, windows, batches(windows, in_order=True), report):
            states[at : at + len(part)] = part
            at += len(part)
    else:
        states = _kept(dense, windows, cache, report)
    head, dtype, device = model.head, model.dtype, model.device  # and no more of the model
    return Teacher(windows, states, lambda rows: head(rows.to(device, dtype)), dense.identity.weights)


@torch.inference_mode()
def _states(model: Llama, windows: Windows, together: Sequence[Tensor], report: Progress) -> Iterator[Tensor]:
    """States (n, H) on the CPU of the scored tokens of the windows, batch after batch."""
    for rows, hidden in predicting(model, windows, None, together):
        yield hidden.cpu()
        report("dense model", int(rows[-1]) + 1, len(windows))


def _kept(dense: LoadedModel, windows: Windows, cache: Path, report: Progress) -> Tensor:
    model, width = dense.model, dense.model.config.hidden_size
    dtype = model.dtype if model.dtype.itemsize == 2 else torch.float16
    key = f"{dense.identity.weights} {model.dtype} {windows.digest}"
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.states"
    size = windows.scored_tokens * width
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # of two that want the same states, one computes them
            if not file.exists() or file.stat().st_size != size * dtype.itemsize:
                _append(model, windows, file.with_suffix(".part"), dtype, report)
                file.with_suffix(".part").replace(file)
    except OSError as error:
        raise RunError(
            f"{file} cannot be written ({error.strerror or error}); make room, or name another folder (--cache)"
        ) from error
    states = torch.from_file(str(file), shared=False, size=size, dtype=dtype)
    return states.view(-1, width)


def _append(model: Llama, windows: Windows, part: Path, dtype: torch.dtype, report: Progress) -> None:
    """Bring the file to its end, from the last batch that it holds whole: in another batch, rounding would differ."""
    row = model.config.hidden_size * dtype.itemsize  # bytes
    together = batches(windows, in_order=True)
    ends = torch.stack([windows.scored[rows].sum() for rows in together]).cumsum(0)
    held = part.stat().st_size // row if part.exists() else 0
    done = int((ends <= held).sum())
    with part.open("ab") as out:
        out.truncate(int(ends[done - 1]) * row if done else 0)
        for states in _states(model, windows, together[done:], report):
            out.write(states.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
        out.flush()
        os.fsync(out.fileno())
