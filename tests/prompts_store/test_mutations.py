"""Thousands of broken files: the reader must refuse or accept each, and never fail in any other way.

"A mutant must be refused" would be the wrong oracle, for many are still good files. A second checker, which shares no
code with the reader, says which; where both accept, the values must be equal bit for bit.
"""

import os
import random

from support.checker import Model, No, check
from support.mutants import BASE, mutant, seeds

from prompts_store.errors import InvalidArtifact
from prompts_store.file import Limits, read_prompt
from prompts_store.prompt import SoftPrompt

MUTANTS = 1_000_000 if os.environ.get("PROMPTSTITCH_FULL") == "1" else 10_000
LIMITS = Limits(max_virtual_tokens=8, dtype="float16")
MODEL = Model(positions=8)


def verdict(data: bytes) -> SoftPrompt | None:
    try:
        return read_prompt(data, LIMITS, default_base=BASE).prompt
    except InvalidArtifact:
        return None


def test_the_checker_accepts_the_seeds():
    for data in seeds():
        check(data, MODEL)
        read_prompt(data, LIMITS, default_base=BASE)


def test_every_mutant_is_refused_or_read_right():
    chance, good = random.Random(20230518), seeds()
    accepted = 0
    for index in range(MUTANTS):
        data = mutant(chance, good)
        try:
            expected = check(data, MODEL)
        except No:
            expected = None
        found = verdict(data)
        assert (found is None) == (expected is None), (index, data)
        if expected is None or found is None:
            continue
        accepted += 1
        for name, values in expected.items():
            assert found.tensors[name].numpy().tobytes() == values.tobytes(), index
    assert MUTANTS * 0.02 < accepted < MUTANTS * 0.5  # both verdicts were put to the test
