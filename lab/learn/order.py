"""What is wanted of a run, what it comes to, and all that can be found wrong before a weight is read.

Knows data, recipes and identities; knows no tensor of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lab.data.documents import Document
from lab.data.splits import Splits
from lab.data.windows import Windows, cut
from lab.learn.budget import Budget
from lab.learn.compute import choose_compute
from lab.learn.recipe import Kind, LearnError, Recipe
from lab.learn.start import parent_of
from llama.config import LlamaConfig
from llama.identity import Identity
from llama.load import choose_device, choose_dtype, info
from llama.tokenizer import HubTokenizer
from prompts_store.level import parse_level
from prompts_store.prompt import Bos, SoftPrompt
from prompts_store.reference import check_task


@dataclass(frozen=True)
class Order:
    """What is wanted. `model` is loaded at `level` (None: as stored) in `dtype`, as it will be served; `dense` is the
    dense checkpoint to distil from (None: `model` itself, if that is stored dense)."""

    model: Path
    level: str | None
    kind: Kind
    task: str | None
    recipe: Recipe
    budget: Budget
    dense: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    compute: str = "auto"
    bos: Bos = "tokenizer"
    seed: int = 0
    base: str | None = None  # of a foreign compressed model, as `llama.identity.identify` takes it


@dataclass(frozen=True)
class Plan:
    """An order that holds: what is learned through, from which windows, and selected on which.

    `dense` is the folder and identity of the dense model if the recipe distils, `parent` the prompt that it starts
    from, if any, `chat_template` the digest of the template if chats are learned, else "none"; `device`, `dtype` and
    `compute` are settled.
    """

    order: Order
    identity: Identity
    config: LlamaConfig
    dense: tuple[Path, Identity] | None
    parent: SoftPrompt | None
    learn: Windows
    select: Windows
    data: str
    chat_template: str
    device: torch.device
    dtype: str
    compute: str

    def record(self) -> dict[str, Any]:
        """All that the outcome depends on, for the run folder."""
        order = self.order
        return {
            "command": "learn",
            "kind": order.kind,
            "task": order.task,
            "recipe": order.recipe.told(),
            "budget": {"amount": order.budget.amount, "unit": order.budget.unit},
            "model": {"base": self.identity.base, "level": self.identity.level, "weights": self.identity.weights},
            "dense": self.dense[1].weights if self.dense else None,
            "data": self.data,
            "learn": self.learn.digest,
            "select": self.select.digest,
            "layout": {"bos": order.bos, "chat_template": self.chat_template},
            "parent": self.parent.digest if self.parent else None,
            "device": self.device.type,
            "dtype": self.dtype,
            "compute": self.compute,
        }


def planned(order: Order, splits: Splits) -> Plan:
    """The order with its windows cut. Raises LearnError, DataError, ModelError, BadReference, BadLevel."""
    order = replace(order, recipe=order.recipe.over(splits.parts["learn"]))
    if order.task is not None:
        check_task(order.task)
    device = choose_device(order.device)
    dtype = str(choose_dtype(order.dtype, device)).removeprefix("torch.")
    told = info(order.model, level=order.level, base=order.base)
    parse_level(told.identity.level)
    dense = _dense(order, told.identity) if order.recipe.distil else None
    _check_room(order, told.config)
    parent = None
    if order.kind in ("rows", "kv"):
        recipe = order.recipe
        parent = parent_of(order.kind, recipe.init, recipe.positions, told.identity.base, told.config)
    tokenizer = HubTokenizer(order.model)
    learn = cut(splits.parts["learn"], tokenizer, order.recipe.window, bos=order.bos)
    select = cut(splits.parts["select"], tokenizer, order.recipe.window, bos=order.bos, most=1)
    few = torch.arange(min(len(select), order.recipe.select_windows))
    chats = _any_chat(splits.parts["learn"])
    return Plan(
        order=order,
        identity=told.identity,
        config=told.config,
        dense=dense,
        parent=parent,
        learn=learn,
        select=select.select(few),
        data=splits.data,
        chat_template=tokenizer.chat_template_digest if chats else "none",
        device=device,
        dtype=dtype,
        compute=choose_compute(order.compute, device),
    )


def _dense(order: Order, identity: Identity) -> tuple[Path, Identity]:
    folder = order.dense or order.model
    dense = info(folder).identity
    if dense.level != "dense":
        raise LearnError(
            f"{folder} is stored at {dense.level}; the recipe distils from the dense model, so name its folder "
            "(--dense), or learn from text alone: --set distil=0"
        )
    if dense.base != identity.base:
        raise LearnError(
            f"--dense {folder} is of base {dense.base}, the model of {identity.base}; name the dense checkpoint that "
            "the model was made from, or say that it is (--base)"
        )
    if dense.weights == identity.weights:
        raise LearnError(
            "the model is the dense one, and nothing is to be learned from itself: learn from text alone, "
            "--set distil=0, or compress it, --level"
        )
    return folder, dense


def _check_room(order: Order, config: LlamaConfig) -> None:
    recipe = order.recipe
    if not recipe.positions and order.kind != "norms":
        raise LearnError("positions is 0; a prompt, and the rank of LoRA, must be at least 1")
    positions = recipe.positions if order.kind in ("rows", "kv") else 0
    needed = positions + recipe.window + (order.bos == "after_prompt")
    if needed > config.max_len:
        raise LearnError(
            f"positions {positions} and window {recipe.window} take {needed} tokens, the model's context has "
            f"{config.max_len}; lower positions or window"
        )


def _any_chat(documents: Sequence[Document]) -> bool:
    return any(document.turns for document in documents)
