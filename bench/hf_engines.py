"""What answers behind `bench.hf_server`: transformers' `generate`, its continuous batching, and PEFT's prompt tuning.

Each is a context manager that yields a function to hand requests in with. Knows tensors and batches; knows no HTTP and
no text.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.streamers import BaseStreamer

PATIENCE = 0.02  # seconds without another request after which a batch starts
PAGE, ROOM = 64, 512  # tokens: a page of the continuous cache (what it shares), and its room for each request
STEP_TOKENS = 1024  # of one continuous step; a longer one multiplies masks that grow with its square


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A request; it takes exactly `max_tokens` tokens, greedily."""

    prompt: str | None  # a soft prompt's name
    ids: list[int]  # the text behind it
    max_tokens: int
    deliver: Callable[[int | Exception], None]  # called with every token as it is made, from any thread


Rows = Mapping[str, torch.Tensor]  # soft prompts by name, (N, H) each
Submit = Callable[[Ask], None]
Answer = Callable[[Sequence[Ask]], None]


@contextmanager
def generating(model: PreTrainedModel, rows: Rows, maximum: int, patience: float = PATIENCE) -> Iterator[Submit]:
    """`generate` over batches of any prompts: soft rows, then the embedded text, padded on the left."""
    embed = model.get_input_embeddings()

    def answer(asks: Sequence[Ask]) -> None:
        soft = [[rows[ask.prompt].to(model.dtype)] if ask.prompt else [] for ask in asks]
        inputs = [torch.cat([*s, embed(torch.tensor(ask.ids))]) for s, ask in zip(soft, asks, strict=True)]
        vectors, mask = _left_padded(inputs)  # (B, T, H), (B, T)
        model.generate(inputs_embeds=vectors, attention_mask=mask, **_greedily(model, asks))

    with _batching(answer, lambda ask: None, maximum, patience) as submit:
        yield submit


@contextmanager
def peft(model: PreTrainedModel, rows: Rows, maximum: int, patience: float = PATIENCE) -> Iterator[Submit]:
    """PEFT's `generate`, an adapter for each prompt: a batch has one of them, since PEFT mixes only those of LoRA.

    PEFT sets positions aside ("not supported"), so that padding between prompt and text counts: a padded batch costs
    what it must, but its shorter texts get other tokens than alone.
    """
    from peft import PromptTuningConfig, get_peft_model, set_peft_model_state_dict  # seconds that the others do without

    config, plain = model.config, model.generate
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    tuned: Any = None  # the PeftModel, once there is an adapter
    for name, soft in rows.items():
        shape = {"num_virtual_tokens": len(soft), "token_dim": config.hidden_size, "num_layers": layers}
        adapter = PromptTuningConfig(task_type="CAUSAL_LM", inference_mode=True, num_attention_heads=heads, **shape)
        if tuned is None:
            tuned = get_peft_model(model, adapter, adapter_name=name, autocast_adapter_dtype=False)
        else:
            tuned.add_adapter(name, adapter)
        set_peft_model_state_dict(tuned, {"prompt_embeddings": soft}, adapter_name=name)

    def answer(asks: Sequence[Ask]) -> None:
        generate = plain
        if name := asks[0].prompt:
            tuned.set_adapter(name)
            generate = tuned.generate
        ids, mask = _left_padded([torch.tensor(ask.ids) for ask in asks])  # (B, T) both
        generate(input_ids=ids, attention_mask=mask, **_greedily(model, asks))

    with _batching(answer, lambda ask: ask.prompt, maximum, patience) as submit:
        yield submit


@contextmanager
def continuous(model: PreTrainedModel, rows: Rows, maximum: int) -> Iterator[Submit]:
    """Continuous batching with a paged cache. It takes ids alone: soft rows become ids behind the vocabulary.

    Only the input table grows, so none of them is ever an answer; pages of a prompt are shared like any prefix.
    """
    table = model.get_input_embeddings().weight  # (V, H), which a tied head keeps
    ends = list(itertools.accumulate((len(soft) for soft in rows.values()), initial=len(table)))
    prompts = {name: list(range(*span)) for name, span in zip(rows, itertools.pairwise(ends), strict=True)}
    longer = torch.cat([table.detach(), *(soft.to(table.dtype) for soft in rows.values())])
    model.set_input_embeddings(torch.nn.Embedding(len(longer), longer.shape[1], _weight=longer))
    room = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=maximum * ROOM // PAGE,
        max_batch_tokens=STEP_TOKENS,
        max_requests_per_batch=maximum,
    )
    manager = model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), room)
    names = map(str, itertools.count())

    def submit(ask: Ask) -> None:
        name = next(names)
        made: list[int] = []

        def deliver(output: GenerationOutput) -> None:
            for token in output.generated_tokens[len(made) :]:  # it holds all so far
                made.append(token)
                ask.deliver(token)
            if output.error:
                ask.deliver(RuntimeError(output.error))

        manager.register_result_handler(name, deliver)
        ids = prompts[ask.prompt] + ask.ids if ask.prompt else ask.ids
        manager.add_request(ids, name, ask.max_tokens, streaming=True)

    manager.start()
    try:
        yield submit
    finally:
        manager.stop()
        manager.destroy()


def _left_padded(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[(T, …)] → (B, longest T, …) and the mask (B, longest T)."""
    ones = [torch.ones(len(x), dtype=torch.long) for x in inputs]
    values, mask = (pad_sequence(list(x), batch_first=True, padding_side="left") for x in (inputs, ones))
    return values, mask


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Gives every request its token of each step, up to as many as it asked for."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._asks = asks
        self._made = -1  # the first call brings the inputs

    def put(self, value: torch.Tensor) -> None:
        if self._made >= 0:
            for ask, token in zip(self._asks, value.tolist(), strict=True):
                if self._made < ask.max_tokens:
                    ask.deliver(token)
        self._made += 1

    def end(self) -> None:
        pass


def _greedily(model: PreTrainedModel, asks: Sequence[Ask]) -> dict[str, object]:
    """Arguments of `generate`: to the longest answer asked for, past any end of text."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    longest = max(ask.max_tokens for ask in asks)
    return {"do_sample": False, "max_new_tokens": longest, "streamer": _Streamer(asks)}


@contextmanager
def _batching(answer: Answer, kind: Callable[[Ask], object], maximum: int, patience: float) -> Iterator[Submit]:
    """A thread that answers the oldest request together with all that wait and are of its kind, `maximum` at most."""
    asks: queue.Queue[Ask | None] = queue.Queue()

    def work() -> None:
        waiting: list[Ask] = []
        while _gather(asks, waiting, maximum, patience):
            batch = [ask for ask in waiting if kind(ask) == kind(waiting[0])][:maximum]
            waiting = [ask for ask in waiting if ask not in batch]
            try:
                with torch.inference_mode():
                    answer(batch)
            except Exception as error:
                for ask in batch:
                    ask.deliver(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield asks.put
    finally:
        asks.put(None)
        thread.join()


def _gather(asks: queue.Queue[Ask | None], waiting: list[Ask], maximum: int, patience: float) -> bool:
    """Add what comes to `waiting`, until it is enough or nothing more comes. False at the end of all.

    What was left waiting by the last batch waits no longer for company.
    """
    patience = 0.0 if waiting else patience
    while len(waiting) < maximum:
        try:
            ask = asks.get(timeout=patience if waiting else None)
        except queue.Empty:
            return True
        if ask is None:
            return False
        waiting.append(ask)
    return True
