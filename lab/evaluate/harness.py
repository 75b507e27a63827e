"""Our model, with or without a soft prompt of either kind, as lm-eval sees a model.

Likelihoods come from `lab.evaluate.score`, in its batches; texts come from the engine that serves. Without a prompt
both are those of lm-eval's own class over transformers. Knows lm-eval's interface; knows no task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.request import Event, GenerationRequest, RequestDone, RequestFailed, SamplingParams, TokenEvent
from engine.served import ServedModel
from lab.data.documents import DataError
from lab.data.windows import windows
from lab.evaluate.score import Progress, score
from llama.load import LoadedModel
from llama.tokenizer import HubTokenizer
from prompts_store.prompt import Bos, SoftPrompt

KV_BYTES = 1 << 28  # of the engine that generates
# What lm-eval's tasks ask of a generator that we have under the same name.
SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})

Pair = tuple[Any, list[int], list[int]]  # what was asked, ids of the context, ids of the continuation


class PromptedLM(TemplateLM):  # type: ignore[misc]
    """A loaded model behind a prompt that fits it. Texts beyond the context lose their beginning, as in lm-eval."""

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: HubTokenizer,
        prompt: SoftPrompt | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._loaded, self._tokenizer, self._prompt, self._progress = loaded, tokenizer, prompt, progress
        self._bos: Bos = "tokenizer" if prompt is None else prompt.bos

    @property
    def max_length(self) -> int:
        """Text tokens that fit into the context behind the prompt."""
        soft = 0 if self._prompt is None else self._prompt.num_virtual_tokens
        return self._loaded.model.config.max_len - soft

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises DataError where the tokenizer has none."""
        if self._tokenizer.eos_token_id is None:
            raise DataError("this model's tokenizer has no EOS token, which lm-eval's tasks need")
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches."""
        return f"{self._loaded.identity.base} {self._tokenizer.chat_template_digest}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the model's own template writes them."""
        return self._tokenizer.chat_text(chat_history, asking=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Ids in the prompt's layout; without a BOS where False is asked for, or where the text brings its own."""
        bos = self._tokenizer.bos_token_id
        brings = bos is not None and string.encode().startswith(self._tokenizer.token_bytes(bos))
        plain = add_special_tokens is False or (add_special_tokens is None and brings)
        return self._tokenizer.encode(string, "none" if plain else self._bos)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **unused: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats of the continuation, whether greedy decoding would give it) of each request."""
        if not requests:
            return []
        rows = [(asked + wanted)[-(self.max_length + 1) :] for _, asked, wanted in requests]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        scored = torch.zeros(ids.shape, dtype=torch.bool)
        for at, (row, (_, _, wanted)) in enumerate(zip(rows, requests, strict=True)):
            ids[at, : len(row)] = torch.tensor(row)
            scored[at, max(1, len(row) - len(wanted)) : len(row)] = True
        data = windows(ids, scored, torch.arange(len(rows)))
        found = score(self._loaded.model, data, self._prompt, progress=self._progress)
        greedy = (found.hits | ~scored).all(1)
        answers = list(zip((-found.nll.double().sum(1)).tolist(), greedy.tolist(), strict=True))
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval asks for it, with our own progress in place of its bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows of the context, each token scored once."""
        pairs: list[Pair] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs += [(None, *make_disjoint_window(pair)) for pair in cut]
            owner += [number] * (len(pairs) - len(owner))
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(pairs), strict=True):
            sums[number] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts that serving would give. Raises DataError for an option that the engine does not have."""
        loaded, told = self._loaded, self._loaded.identity
        served = ServedModel(told.name, told.base, told.level, told.weights, loaded.resident_bytes)
        size = EngineOptions(
            kv_bytes=KV_BYTES, max_waiting=len(requests) + 1, max_waiting_tokens=1 << 40, max_virtual_tokens=1 << 16
        )
        engine = LocalEngine(loaded.model, self._tokenizer, served, size)
        events: SimpleQueue[tuple[int, Sequence[Event]]] = SimpleQueue()
        texts, left = [""] * len(requests), len(requests)
        try:
            for number, request in enumerate(requests):
                ids, sampling = self._asked(*request.args)
                asked = GenerationRequest(str(number), ids, self._prompt, sampling)
                engine.submit(asked, partial(_pass_on, events, number))
            while left:
                number, batch = events.get()
                for event in batch:
                    if isinstance(event, TokenEvent):
                        texts[number] += event.text
                    elif isinstance(event, RequestFailed):
                        raise DataError(f"request {number} failed: {event.message}")
                    left -= isinstance(event, RequestDone)
                if self._progress:
                    self._progress("generate", len(requests) - left, len(requests))
        finally:
            engine.close()
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _asked(self, context: str, options: Mapping[str, Any]) -> tuple[tuple[int, ...], SamplingParams]:
        told = dict(normalize_gen_kwargs(dict(options)))
        tokens, stop = told.pop("max_gen_toks"), tuple(text for text in told.pop("until") if text)
        told.pop("do_sample")
        if unknown := sorted(told.keys() - SAMPLING):
            raise DataError(f"the task asks for {', '.join(unknown)}, which this engine does not know")
        room = self.max_length - tokens
        if room < 1:
            raise DataError(f"the task generates {tokens} tokens, more than the context of {self.max_length} allows")
        return tuple(self.tok_encode(context)[-room:]), SamplingParams(**told, stop=stop, max_tokens=tokens)


def _pass_on(events: SimpleQueue[tuple[int, Sequence[Event]]], number: int, batch: Sequence[Event]) -> None:
    events.put((number, batch))
