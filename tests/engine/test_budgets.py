"""What a step of the engine costs, in things that can be counted: budgets that hold on every machine, at any load.

A budget is a constant of the step and so much for each sequence in it: one operator more for a token, or work that
grows with the square of the batch, does not fit. Whoever makes a step cheaper lowers the budget with it.
"""

import itertools

import pytest
import torch
from support import tiny
from support.checkpoints import model, save
from support.counting import ByHand, Counts, count, instructions, kept

from engine import attention
from engine.attention import Span
from engine.options import EngineOptions
from engine.pages import PagePool
from engine.request import GenerationRequest, SamplingParams
from engine.served import ServedModel
from llama import native
from llama.load import load

PAGE = 16  # steps until the same comes round: a page for every sequence
AIR = {"calls": 1.02, "builtins": 1.02, "allocated": 1.1, "copied": 1.1}  # torch's release is pinned: none for its own
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048}
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "seed": 1},
    "logprobs": {"logprobs": 5},
}
# Of a step, and of each sequence in it, both over a page's length: what comes once a page is a fraction. Bytes are of
# this model. By kernels: blocks, norm and head are three calls.
BUDGETS = {
    ("kernels", "greedy"): (
        Counts(operators=39.2, lists=7.1, kernels=3, calls=62.1, builtins=76.2),
        Counts(allocated=16_800, copied=9_900, calls=36.25, builtins=27.7),
    ),
    ("kernels", "sampled"): (
        Counts(operators=29.2, lists=7.1, kernels=3, calls=60.1, builtins=68.2),
        Counts(operators=31, allocated=73_700, copied=29_700, calls=46.25, builtins=53.7),
    ),
    ("kernels", "logprobs"): (
        Counts(operators=39.2, lists=7.1, kernels=3, calls=62.1, builtins=76.2),
        Counts(operators=8, allocated=25_100, copied=9_900, calls=37.25, builtins=31.7),
    ),
    ("torch", "greedy"): (
        Counts(operators=119.2, lists=6.1, allocated=500, calls=99.1, builtins=89.2),
        Counts(allocated=90_200, copied=69_700, calls=39.25, builtins=26.7),
    ),
    ("torch", "sampled"): (
        Counts(operators=109.2, lists=6.1, allocated=500, calls=97.1, builtins=81.2),
        Counts(operators=31, allocated=147_200, copied=89_600, calls=49.25, builtins=52.7),
    ),
}
PREFILL = (  # of a step with one text, and of each of its tokens
    Counts(operators=48, lists=9, kernels=3, allocated=22_000, copied=26_000, calls=164, builtins=181),
    Counts(allocated=3_110, copied=390, calls=0.1875, builtins=2.5),
)
names = itertools.count()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    reference = model(**SHAPE)
    return reference, save(tmp_path_factory.mktemp("model"), reference)


@pytest.fixture
def make(checkpoint, monkeypatch, request):
    """Engines by hand, over our kernels in bf16 or plain torch in fp32."""
    torch.set_num_threads(1)
    reference, folder = checkpoint
    engines = []

    def make(by: str) -> ByHand:
        if by == "kernels":
            if native.kernels() is None:
                pytest.skip("the kernels were not built, or this CPU does not run them")
            llama = load(folder, level="w4g64", dtype="bfloat16", device="cpu").model
        else:
            monkeypatch.setattr(attention, "kernels", lambda: None)
            llama = tiny.ours(reference)
        served = ServedModel("tiny", tiny.BASE, "dense", "sha256:" + "c" * 64, 0)
        options = EngineOptions(page_size=PAGE, kv_bytes=1 << 24, max_batch_tokens=4096)
        engines.append(ByHand(llama, tiny.ByteTokenizer(), served, options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def begin(engine: ByHand, sequences: int, prompt=None, length: int = 40, **sampling) -> None:
    """Requests that go on for long, told to nobody, no two of one text."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 400, "ignore_eos": True, **sampling})
    for _ in range(sequences):
        number = next(names)
        text = (number % 200, number // 200, *range(2, length))
        engine.submit(GenerationRequest(str(number), text, prompt, params), lambda events: None)


def decoding(engine: ByHand, sequences: int, prompt=None, **sampling) -> ByHand:
    begin(engine, sequences, prompt, **sampling)
    engine.turn()
    engine.turn()
    return engine


def over(counts: Counts, of_step: Counts, of_each: Counts, each: int) -> dict[str, tuple[float, float]]:
    """What does not fit: count and budget."""
    most = {name: (budget + each * getattr(of_each, name)) * AIR.get(name, 1) for name, budget in vars(of_step).items()}
    return {name: (found, most[name]) for name, found in vars(counts).items() if found > most[name]}


@pytest.mark.parametrize("sequences", [1, 32])
@pytest.mark.parametrize(("by", "kind"), BUDGETS)
def test_a_decode_step(make, by, kind, sequences):
    engine = decoding(make(by), sequences, **KINDS[kind])
    assert not over(count(engine.turn, PAGE), *BUDGETS[by, kind], sequences)


def test_a_decode_step_behind_a_soft_prompt(make):
    """It may ask how long the prompt is, and no more."""
    plain, soft = (
        count(decoding(make("torch"), 8, prompt, length=48 - n).turn, PAGE)
        for n, prompt in ((0, None), (20, tiny.rows(20, 128)))
    )
    plain.calls += 8 * 8
    assert soft == plain


@pytest.mark.parametrize("tokens", [64, 512])
def test_the_first_step_of_a_text(make, tokens):
    """From `submit` on, behind a soft prompt that is there: twice the tokens, not one operator more."""
    engine, prompt = make("kernels"), tiny.rows(20, 128)

    def step() -> None:
        begin(engine, 1, prompt, tokens, max_tokens=1)
        engine.turn()

    step()
    assert not over(count(step), *PREFILL, tokens)


def test_python_work_grows_with_the_batch_alone(make):
    """Neither with its square nor with how much stands before the token."""
    few, some, many = (instructions(decoding(make("torch"), n).turn, PAGE) for n in (4, 8, 16))
    assert many - some <= 2.1 * (some - few)
    long = instructions(decoding(make("torch"), 4, length=1000).turn, PAGE)
    assert long <= few * 1.01


def test_nothing_is_kept_but_the_tokens(make):
    """A number for each, and for each page a key and its block; the rest is play for what comes and goes."""
    engine = decoding(make("torch"), 8)
    kept(engine.turn, PAGE)  # what is kept once
    assert kept(engine.turn, 3 * PAGE) < 8 * 2


def test_counting_sees_what_it_should():
    table = torch.zeros(4, 8)

    def step() -> None:
        table[torch.tensor([1, 2])] = torch.ones(2, 8)

    counted = count(step, 3)
    assert (counted.operators, counted.lists, counted.copied) == (2, 1, 2 * 8 * 4)
    assert counted.allocated == 2 * 8 + 2 * 8 * 4
    assert count(lambda: Span([1], 3, 4).end) == Counts(calls=1)
    pool = PagePool(8, 4)
    assert count(lambda: pool.available) == Counts(calls=1, builtins=1)
    assert instructions(lambda: pool.available) > instructions(lambda: pool.cached) > 0
