"""Prompt files, and the thousand ways in which one comes out broken, or nearly."""

import json
import random
import re
import struct

import numpy as np
import torch

from prompts_store.file import PromptFile, Provenance, encode_prompt
from prompts_store.prompt import SoftPrompt

BASE = "sha256:" + "ba" * 32
LEVEL = "w4g128-s50"
HIDDEN, KV = 8, (2, 1, 4)  # of every seed; layers, KV heads, head dim
NUMBERS = b"0 1 -1 2 1.0 1e2 4 8 32 null true NaN 18446744073709551616 9999999999999999999999999 1e999 00 -0".split()
WORDS = rb'''"F32" "F16" "BF16" "F64" "keys" "values" "shape" "dtype" "kv" "rows" "__metadata__" "base"
    "none" "level" "task" "" [] {} "\ud800" "\u0000" "../x"'''.split()


def seeds() -> list[bytes]:
    """Good files of every kind, dtype and amount of metadata."""
    origin = Provenance("general", LEVEL, BASE, {"lr": 0.1, "steps": [1, {"a": None}]}, "2026-11-24T05:22:00+00:00")
    random_numbers = torch.Generator().manual_seed(0)
    rows = {"prompt_embeddings": torch.randn(4, HIDDEN, generator=random_numbers)}
    layers, heads, d = KV
    deep = {name: torch.randn(layers, heads, 3, d, generator=random_numbers) for name in ("keys", "values")}
    prompts = (
        SoftPrompt("rows", BASE, rows),
        SoftPrompt("kv", BASE, deep),
        SoftPrompt("rows", BASE, rows, bos="none"),
    )
    files = [encode_prompt(PromptFile(prompt, o)) for prompt in prompts for o in (origin, Provenance())]
    for dtype, item, size in (("F16", "<f2", 2), ("BF16", "<u2", 2), ("F32", "<f4", 4)):
        entry = {"dtype": dtype, "shape": [2, HIDDEN], "data_offsets": [0, 2 * HIDDEN * size]}
        header = json.dumps({"prompt_embeddings": entry}).encode()
        files.append(struct.pack("<Q", len(header)) + header + np.arange(2 * HIDDEN).astype(item).tobytes())
    return files


def flip(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def flip_header(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(min(len(data), 8 + header_size(data)))] ^= 1 << chance.randrange(8)


def put(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data))
    data[at] = chance.choice(b'0123456789-+.eE{}[]":,\\ \n\t\x00\xff\x7f\x80aFN')


def cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data)) :]


def drop(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.randrange(1, 9)]


def insert(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))


def double(chance: random.Random, data: bytearray) -> None:
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    data[b:b] = data[a:b]


def resize(chance: random.Random, data: bytearray) -> None:
    size = chance.choice(
        [0, 1, header_size(data) - 1, header_size(data) + 1, len(data), 65536, 2**32, 2**63, 2**64 - 1]
    )
    data[:8] = struct.pack("<Q", max(0, size))


def number(chance: random.Random, data: bytearray) -> None:
    """One number of the header becomes another, the header's length with it."""
    rewrite(chance, data, rb"[0-9]+", NUMBERS)


def word(chance: random.Random, data: bytearray) -> None:
    """One word of the header becomes another one of the format."""
    rewrite(chance, data, rb'"[A-Za-z_]*"', WORDS)


def repeat_member(chance: random.Random, data: bytearray) -> None:
    rewrite(chance, data, rb'"[a-z_]*":(?:"[^"]*"|\[[^\]]*\])', [b"$0,$0", b"", b'$0,"x":1', b" $0 "])


def rewrite(chance: random.Random, data: bytearray, pattern: bytes, others: list[bytes]) -> None:
    size = header_size(data)
    header = bytes(data[8 : 8 + size])
    found = list(re.finditer(pattern, header))
    if found:
        match = chance.choice(found)
        header = header[: match.start()] + chance.choice(others).replace(b"$0", match[0]) + header[match.end() :]
        data[: 8 + size] = struct.pack("<Q", len(header)) + header


def header_size(data: bytearray) -> int:
    return min(int.from_bytes(data[:8], "little"), len(data))


MUTATIONS = [flip, flip_header, put, cut, drop, insert, double, resize, number, number, word, word, repeat_member]


def mutant(chance: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if len(data) > 8:
            chance.choice(MUTATIONS)(chance, data)
    return bytes(data)
