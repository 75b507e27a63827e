"""What a piece of work costs in things that can be counted, the same on every machine and under any load.

Counts are of the calling thread. The work is done twice, since counting torch's operators calls Python functions: it
must cost the same both times.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.engine import LocalEngine
from llama import native

ROOT = str(Path(__file__).parents[2])
OURS = tuple(f"{ROOT}/{package}/" for package in ("server", "engine", "llama", "prompts_store"))
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>"}  # frames of their own before Python 3.12 only
COPIES = {"_to_copy", "cat", "clone", "copy_", "index", "index_copy_", "index_put_", "index_select", "to"}


@dataclass
class Counts:
    """Of one step; a mean where it is a fraction."""

    operators: float = 0  # torch's
    lists: float = 0  # made tensors
    kernels: float = 0  # our own called
    allocated: float = 0  # bytes of new tensors
    copied: float = 0  # bytes from tensor to tensor
    calls: float = 0  # of our Python functions, generators resumed
    builtins: float = 0  # called by our Python functions


class ByHand(LocalEngine):
    """An engine without a thread: it turns when it is told to."""

    def _run(self, started: Any) -> None:
        started.set()

    def turn(self) -> None:
        self._turn()


def count(step: Callable[[], object], times: int = 1) -> Counts:
    """The mean over `times` steps, which come round twice."""
    counts = Counts()
    with _Operators(counts), _kernels(counts):
        for _ in range(times):
            step()
    with _functions(counts):
        for _ in range(times):
            step()
    return Counts(**{name: total / times for name, total in vars(counts).items()})


def kept(step: Callable[[], object], times: int) -> float:
    """Blocks of memory that Python holds more of after each of `times` steps."""
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(times):
        step()
    gc.collect()
    return (sys.getallocatedblocks() - before) / times


def instructions(step: Callable[[], object], times: int = 1) -> float:
    """Of Python's, in our functions; comparable within one version of Python only."""
    count = 0

    def traced(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        for _ in range(times):
            step()
    finally:
        sys.settrace(before)
    return count / times


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        counts, name = self.counts, func.overloadpacket.__name__
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name == "lift_fresh":  # the last thing that happens to torch.tensor([...])
            counts.lists += 1
            counts.allocated += sum(t.nbytes for t in made)
            return out
        counts.operators += 1
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        counts.allocated += sum(t.nbytes for t in made if t.untyped_storage()._cdata not in given)
        if name in COPIES:
            source = args[-1] if name.endswith("_") else out
            counts.copied += source.nbytes if isinstance(source, torch.Tensor) else 0
        return out


@contextmanager
def _kernels(counts: Counts) -> Iterator[None]:
    ours = native.kernels()

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def called(*args: Any) -> None:
            counts.kernels += 1
            call(*args)

        return called

    calls = ours._call if ours else {}
    with patch.dict(calls, {name: counted(call) for name, call in calls.items()}):
        yield


@contextmanager
def _functions(counts: Counts) -> Iterator[None]:
    def seen(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            if event == "call":
                counts.calls += code.co_name not in COMPREHENSIONS
            elif event == "c_call":
                counts.builtins += 1

    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(None)
