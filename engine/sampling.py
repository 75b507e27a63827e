"""From logits to tokens.

Pure functions of logits, parameters and a position in a seeded stream: what else is in the batch does not matter. Knows
no sequences and no text.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import sent
from engine.request import SamplingParams, TokenLogprob

COLDEST = 1e-5  # below it a temperature is greedy: logits divided by it would leave fp32
SHORTLIST = 1024  # candidates looked at before the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class Row:
    """What is needed to choose one token. `tokens` are text then generated; `banned` ids cannot be chosen; `ahead` more
    tokens come between, which are not known here yet."""

    params: SamplingParams
    seed: int
    index: int  # of the choice
    tokens: Sequence[int]
    num_text: int
    banned: frozenset[int] = frozenset()
    ahead: int = 0

    @property
    def step(self) -> int:
        """How many tokens of this choice come before."""
        return len(self.tokens) - self.num_text + self.ahead

    @property
    def plain(self) -> bool:
        """Whether the token follows from the logits alone, or from them and noise."""
        p = self.params
        filtered = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
        adjusted = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty or p.logit_bias or self.banned
        return not adjusted and p.logprobs is None and not (filtered and p.temperature >= COLDEST)


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """logits (R, V) fp32, changed in place → one token for each row.

    Log-probabilities are of the raw logits. Then penalties, bias and bans; temperature; top_k, top_p, min_p.
    """
    each = logits.unbind()
    raw = {i: each[i].log_softmax(-1) for i, row in enumerate(rows) if row.params.logprobs is not None}
    for one, row in zip(each, rows, strict=True):
        _adjust(one, row)
    best = _best(logits).tolist() if any(row.params.temperature < COLDEST for row in rows) else []
    tokens = [
        _draw(one / row.params.temperature, row) if row.params.temperature >= COLDEST else best[i]
        for i, (one, row) in enumerate(zip(each, rows, strict=True))
    ]
    return [
        Sampled(token, told(raw[i], token, row.params.logprobs or 0) if i in raw else None)
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """logits (R, V) fp32 of plain rows → the tokens (R,) that `sample` gives, or -1 where they are not finite; on the
    device, which is not waited for."""
    best, each = _best(logits), logits.unbind()
    tokens = torch.stack(
        [
            _drawn(one / row.params.temperature, row) if row.params.temperature >= COLDEST else best[i]
            for i, (one, row) in enumerate(zip(each, rows, strict=True))
        ]
    )
    return tokens.masked_fill_(~logits.sum(-1).isfinite(), -1)


def told(logprobs: Tensor, token: int, top: int) -> TokenLogprob:
    """logprobs (V,) → the token's own beside the `top` best."""
    best = logprobs.topk(top)
    return TokenLogprob(
        token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )


def noise(seed: int, index: int, step: int, size: int, ids: Tensor | None = None) -> Tensor:
    """Standard Gumbel noise (size,), on the CPU, that depends on seed, choice and token position alone.

    With `ids` what stands there (len(ids),), at less cost: the stream up to the last of them, the logarithms of them
    alone.
    """
    key = b"".join(part.to_bytes(8, "little") for part in (seed, index, step))
    stream = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little"))
    drawn = torch.rand(size, generator=stream) if ids is None else torch.rand(int(ids.max()) + 1, generator=stream)[ids]
    return drawn.log_().neg_().log_().neg_()


def _best(logits: Tensor) -> Tensor:
    """argmax (R,), the first of equals; on the CPU eight times faster by finding the best stretch first."""
    stretch = 256
    if logits.shape[1] % stretch:
        return logits.argmax(-1)
    stretches = logits.view(len(logits), logits.shape[1] // stretch, stretch)
    at = stretches.amax(-1).argmax(-1)  # (R,)
    return at * stretch + stretches[torch.arange(len(logits), device=logits.device), at].argmax(-1)


def _adjust(logits: Tensor, row: Row) -> None:
    """Penalties, bias and bans on one row (V,), in place.

    repetition: Keskar et al. 2019, over text and generated tokens; presence and frequency as OpenAI defines them,
    over generated tokens.
    """
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(row.tokens[row.num_text :])
        if counts:
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
            logits[list(counts)] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits[list(ids)] += torch.tensor(biases, device=logits.device, dtype=logits.dtype)
    if row.banned:
        logits[sorted(row.banned)] = -math.inf


def _draw(scaled: Tensor, row: Row) -> int:
    """One row (V,), temperature applied, under top_k, top_p and min_p, in this order.

    What is left is drawn by the Gumbel-max trick (Gumbel 1954). To invert the cumulative distribution would be cheaper;
    but there rounding, which differs from batch to batch, moves every border between two tokens.
    """
    if row.params.top_k == 0 and row.params.top_p >= 1 and row.params.min_p <= 0:
        return int(_drawn(scaled, row))
    values, ids = _kept(scaled, row.params)
    drawn = noise(row.seed, row.index, row.step, scaled.shape[0], ids.cpu())
    return int(ids[drawn.to(scaled.device).add_(values).argmax()])


def _drawn(scaled: Tensor, row: Row) -> Tensor:
    """The same where nothing is filtered: () int64."""
    drawn = sent(noise(row.seed, row.index, row.step, scaled.shape[0]), scaled.device)
    return drawn.add_(scaled).argmax()


def _kept(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What the filters leave, best first: values and ids."""
    limit = min(params.top_k or scaled.shape[0], scaled.shape[0])
    values, ids = scaled.topk(min(limit, SHORTLIST))
    probabilities = (values - (values if limit <= SHORTLIST else scaled).logsumexp(-1)).exp()
    if limit > SHORTLIST and not _reaches(probabilities, params):
        values, ids = scaled.topk(limit)
        probabilities = (values - values.logsumexp(-1)).exp()
    keep = probabilities.cumsum(-1) - probabilities < params.top_p
    if params.min_p > 0:
        keep &= probabilities >= params.min_p * probabilities[0]
    keep[:1].fill_(True)  # the best one always stays
    return values[keep], ids[keep]


def _reaches(probabilities: Tensor, params: SamplingParams) -> bool:
    """Whether what top_p and min_p keep lies within the shortlist (only if top_k does not cut behind it)."""
    if params.top_k:
        return False
    return bool(probabilities.sum() >= params.top_p or probabilities[-1] < params.min_p * probabilities[0])
