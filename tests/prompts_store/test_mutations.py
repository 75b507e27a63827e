"""Thousands of broken files: the reader must refuse or accept each, and never fail in any other way.

"A mutant must be refused" would be the wrong oracle, for many are still good files. A second checker, which shares no
code with the reader (json, struct and numpy alone), says which; where both accept, the values must be equal bit for
bit.
"""

import json
import os
import random
import re
import struct
from datetime import datetime

import numpy as np
import pytest

from prompts_store.errors import InvalidArtifact
from prompts_store.file import Limits, PromptFile, Provenance, encode_prompt, read_prompt
from prompts_store.prompt import SoftPrompt

MUTANTS = 1_000_000 if os.environ.get("PROMPTSTITCH_FULL") == "1" else 10_000
BASE = "sha256:" + "ba" * 32
LIMITS = Limits(max_virtual_tokens=8, dtype="float16")
ITEM = {"F32": 4, "F16": 2, "BF16": 2}
KEYS = {"format", "kind", "base", "hidden_size", "task", "level", "weights", "bos", "chat_template", "train", "created"}
DIGEST = r"sha256:[0-9a-f]{64}"
LEVEL = r"dense|(?:int8|nf4|w[2-8](?:g[1-9][0-9]{0,4})?)(?:-s(?:[1-9][0-9]?|2of4))?|s(?:[1-9][0-9]?|2of4)"
TASK = r"[a-z0-9]+(?:[._-][a-z0-9]+)*"

NUMBERS = b"0 1 -1 2 1.0 1e2 4 8 32 null true NaN 18446744073709551616 9999999999999999999999999 1e999 00 -0".split()
WORDS = rb'''"F32" "F16" "BF16" "F64" "keys" "values" "shape" "dtype" "kv" "rows" "__metadata__" "base"
    "none" "level" "task" "" [] {} "\ud800" "\u0000" "../x"'''.split()


class No(Exception):
    """The checker's refusal."""


def need(condition: object) -> None:
    if not condition:
        raise No


def strict(text: bytes) -> dict:
    """JSON with the promises of the format, by other means than the reader's."""

    def pairs(items):
        need(len({key for key, _ in items}) == len(items))
        return dict(items)

    def const(_name):
        raise No

    def deep(value, left=16):
        need(left >= 0)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            deep(item, left - 1)

    need(text[:1] == b"{")
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=const)
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates
        need("Infinity" not in json.dumps(value).replace('"Infinity', ""))
    except (ValueError, RecursionError):
        raise No from None
    for value_text in re.findall(rb"-?[0-9.eE+-]+", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", text)):
        need(len(value_text) <= 20 or re.search(rb"[.eE]", value_text))
    deep(value)
    return value


def check(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of an acceptable file in fp32, or No."""
    need(len(data) > 8)
    (size,) = struct.unpack("<Q", data[:8])
    need(0 < size <= 65536 and 8 + size <= len(data))
    header, body = data[8 : 8 + size].rstrip(b" "), data[8 + size :]
    need(header.endswith(b"}"))
    fields = strict(header)
    meta = fields.pop("__metadata__", {})
    need(isinstance(meta, dict) and meta.keys() <= KEYS and all(isinstance(text, str) for text in meta.values()))
    names = set(fields)
    need(names in ({"prompt_embeddings"}, {"keys", "values"}))
    kind = "rows" if len(names) == 1 else "kv"
    need(all(isinstance(e, dict) and set(e) == {"dtype", "shape", "data_offsets"} for e in fields.values()))
    need(len({json.dumps([e["dtype"], e["shape"]]) for e in fields.values()}) == 1)
    tensors, end = {}, 0
    for name, e in sorted(fields.items(), key=lambda item: str(item[1]["data_offsets"]).zfill(64)):
        dtype, shape, offsets = e["dtype"], e["shape"], e["data_offsets"]
        need(isinstance(dtype, str) and dtype in ITEM)
        for numbers in (shape, offsets):
            need(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers))
        need(len(offsets) == 2 and len(shape) == (2 if kind == "rows" else 4) and all(shape))
        count = 1
        for axis in shape:
            count *= axis
        need(offsets[0] == end and offsets[1] - end == count * ITEM[dtype] and offsets[1] <= len(body))
        piece, end = body[end : offsets[1]], offsets[1]
        if dtype == "BF16":
            values = (np.frombuffer(piece, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(piece, "<f4" if dtype == "F32" else "<f2").astype("<f4")
        with np.errstate(over="ignore"):
            need(np.isfinite(values).all() and np.isfinite(values.astype("<f2")).all())
        tensors[name] = values.reshape(shape)
    need(end == len(body))
    shape = next(iter(tensors.values())).shape
    need(shape[0 if kind == "rows" else 2] <= 8)
    check_metadata(meta, kind, shape)
    return tensors


def check_metadata(meta: dict[str, str], kind: str, shape: tuple[int, ...]) -> None:
    full = re.fullmatch
    need(meta.get("format", "pt") in ("pt", "promptstitch.v1") and meta.get("kind", kind) == kind)
    need(full(DIGEST, meta.get("base", BASE)) and full(DIGEST, meta.get("weights", BASE)))
    need(full(f"none|{DIGEST}", meta.get("chat_template", "none")))
    need(meta.get("bos", "none") in ("tokenizer", "none", "after_prompt"))
    need(
        full(TASK, meta.get("task", "a"))
        and len(meta.get("task", "a")) <= 128
        and full(LEVEL, meta.get("level", "s50"))
    )
    need(full("[0-9]{1,9}", meta.get("hidden_size", "1")))
    need(kind == "kv" or "hidden_size" not in meta or int(meta["hidden_size"]) == shape[1])
    if "train" in meta:
        need(len(meta["train"].encode()) <= 16384)
        text = meta["train"].encode().rstrip(b" ")
        need(text.endswith(b"}"))
        strict(text)
    if "created" in meta:
        need(meta["created"].isascii() and len(meta["created"]) <= 40)
        try:
            datetime.fromisoformat(meta["created"])
        except ValueError:
            raise No from None


@pytest.fixture(scope="module")
def seeds(rows, kv) -> list[bytes]:
    """Good files of every kind, dtype and amount of metadata."""
    origin = Provenance(
        "general", "w4g128-s50", BASE, {"lr": 0.1, "steps": [1, {"a": None}]}, "2026-11-24T05:22:00+00:00"
    )
    files = [
        encode_prompt(PromptFile(p, o)) for p in (rows(1), kv(2), rows(3, bos="none")) for o in (origin, Provenance())
    ]
    for dtype, item in (("F16", "<f2"), ("BF16", "<u2"), ("F32", "<f4")):
        header = json.dumps(
            {"prompt_embeddings": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * ITEM[dtype]]}}
        )
        body = np.arange(6).astype(item).tobytes()
        files.append(struct.pack("<Q", len(header)) + header.encode() + body)
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


def verdict(data: bytes) -> SoftPrompt | None:
    try:
        return read_prompt(data, LIMITS, default_base=BASE).prompt
    except InvalidArtifact:
        return None


def test_the_checker_accepts_the_seeds(seeds):
    for data in seeds:
        check(data)
        read_prompt(data, LIMITS, default_base=BASE)


def test_every_mutant_is_refused_or_read_right(seeds):
    chance = random.Random(20230518)
    accepted = 0
    for index in range(MUTANTS):
        data = mutant(chance, seeds)
        try:
            expected = check(data)
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
