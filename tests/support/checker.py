"""A second reader of prompt files, which shares no code with ours: json, struct and numpy alone. It judges mutants."""

import json
import re
import struct
from dataclasses import dataclass
from datetime import datetime

import numpy as np

ITEM = {"F32": 4, "F16": 2, "BF16": 2}
KEYS = {"format", "kind", "base", "hidden_size", "task", "level", "weights", "bos", "chat_template", "train", "created"}
KEYS |= {"golden"}
DIGEST = r"sha256:[0-9a-f]{64}"
LEVEL = r"dense|(?:int8|nf4|w[2-8](?:g[1-9][0-9]{0,4})?)(?:-s(?:[1-9][0-9]?|2of4))?|s(?:[1-9][0-9]?|2of4)"
TASK = r"[a-z0-9]+(?:[._-][a-z0-9]+)*"


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


@dataclass(frozen=True)
class Model:
    """What is served: how many positions a prompt may have, the base and the shapes; None where any will do."""

    positions: int
    base: str | None = None
    hidden: int | None = None
    kv: tuple[int, int, int] | None = None  # layers, KV heads, head dim


def check(data: bytes, model: Model) -> dict[str, np.ndarray]:
    """The tensors of a file that can be served in fp16, in fp32; or No."""
    meta, tensors = parse(data)
    kind = "rows" if len(tensors) == 1 else "kv"
    shape = next(iter(tensors.values())).shape
    need(shape[0 if kind == "rows" else 2] <= model.positions)
    need(model.base in (None, meta.get("base", model.base)))
    if kind == "rows":
        need(model.hidden in (None, shape[1]))
    else:
        need(model.kv in (None, (shape[0], shape[1], shape[3])))
        need(model.hidden is None or int(meta.get("hidden_size", model.hidden)) == model.hidden)
    return tensors


def parse(data: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a file whose format is right; or No."""
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
    check_metadata(meta, kind, next(iter(tensors.values())).shape)
    return meta, tensors


def check_metadata(meta: dict[str, str], kind: str, shape: tuple[int, ...]) -> None:
    full = re.fullmatch
    need(meta.get("format", "pt") in ("pt", "promptstitch.v1") and meta.get("kind", kind) == kind)
    need(all(full(DIGEST, meta[name]) for name in ("base", "weights") if name in meta))
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
    if "golden" in meta:
        text = meta["golden"].encode().rstrip(b" ")
        need(text.endswith(b"}"))
        golden = strict(text)
        need(golden.keys() == {"ids", "loss"} and isinstance(golden["ids"], list) and 2 <= len(golden["ids"]) <= 256)
        need(all(type(n) is int and 0 <= n < 2**31 for n in golden["ids"]))
        need(type(golden["loss"]) in (int, float) and 0 <= golden["loss"] <= 1000)
    if "created" in meta:
        need(meta["created"].isascii() and len(meta["created"]) <= 40)
        try:
            datetime.fromisoformat(meta["created"])
        except ValueError:
            raise No from None
