"""The prompt file: what is read bit for bit, what is written canonically, and all that is refused."""

import io
import json
import pickle
import struct
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from prompts_store.errors import InvalidArtifact
from prompts_store.file import Limits, PromptFile, Provenance, encode_prompt, read_prompt, write_prompt
from prompts_store.header import MAX_HEADER_BYTES, read_header

BASE = "sha256:" + "ba" * 32
OTHER = "sha256:" + "0b" * 32
RECIPE = {"steps": 100, "lr": 0.3, "data": {"digest": OTHER, "names": ["c4", "ü"]}, "seed": 2**64 - 1, "done": True}


def raw(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of just these parts."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape=(2, 4), dtype="F32", offsets=(0, 32)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def rows_file(metadata: dict | None = None, data: bytes = bytes(32), **changes) -> bytes:
    return raw({"__metadata__": {"base": BASE, **(metadata or {})}, "prompt_embeddings": entry(**changes)}, data)


def test_a_file_is_read_back_as_it_was_written(rows, kv, tmp_path):
    origin = Provenance("general", "w4g128-s50", OTHER, RECIPE, "2026-11-24T05:22:00Z")
    for prompt in (rows(1), kv(2), rows(3, bos="after_prompt", chat_template=OTHER)):
        file = PromptFile(prompt, origin)
        write_prompt(tmp_path / "p.safetensors", file)
        again = read_prompt(tmp_path / "p.safetensors")
        assert again == file
        assert not again.bound
        assert again.prompt.digest == prompt.digest
        assert encode_prompt(again) == (tmp_path / "p.safetensors").read_bytes()


def test_the_safetensors_library_reads_what_we_write(kv, tmp_path):
    write_prompt(tmp_path / "p.safetensors", PromptFile(kv(1), Provenance(train=RECIPE)))
    with safe_open(tmp_path / "p.safetensors", "pt") as theirs:
        assert {name: theirs.get_tensor(name).tolist() for name in theirs.keys()} == {  # noqa: SIM118
            name: tensor.tolist() for name, tensor in kv(1).tensors.items()
        }
        assert json.loads(theirs.metadata()["train"]) == RECIPE
        assert theirs.metadata()["format"] == "promptstitch.v1"
    assert struct.unpack("<Q", (tmp_path / "p.safetensors").read_bytes()[:8])[0] % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "promptstitch.v1", "kind": "rows"}])
def test_we_read_what_the_safetensors_library_writes(dtype, metadata):
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    file = read_prompt(save({"prompt_embeddings": values}, metadata), default_base=BASE)
    assert torch.equal(file.prompt.tensors["prompt_embeddings"], values.float())
    assert (file.prompt.base, file.bound) == (BASE, True)


def test_two_keys_of_the_library_in_any_dtype():
    deep = {name: torch.randn(2, 1, 3, 4).to(torch.bfloat16) for name in ("values", "keys")}
    prompt = read_prompt(save(deep, {"base": BASE})).prompt
    assert prompt.kind == "kv"
    assert all(torch.equal(prompt.tensors[name], deep[name].float()) for name in deep)


def test_the_same_rows_have_one_digest_whatever_the_dtype_and_the_provenance(rows):
    halves = rows(1).tensors["prompt_embeddings"].half()
    narrow = read_prompt(save({"prompt_embeddings": halves}), default_base=BASE)
    wide = read_prompt(save({"prompt_embeddings": halves.float()}, {"base": BASE, "task": "x", "level": "s50"}))
    assert narrow.prompt == wide.prompt
    assert wide.provenance.task == "x"


def test_bos_counts_where_the_file_does_not_say():
    assert read_prompt(rows_file()).prompt.bos == "tokenizer"
    assert read_prompt(rows_file(), bos="none").prompt.bos == "none"
    assert read_prompt(rows_file({"bos": "none"}), bos="none").prompt.bos == "none"
    with pytest.raises(InvalidArtifact, match="leave that out") as refused:
        read_prompt(rows_file({"bos": "none"}), bos="after_prompt")
    assert refused.value.code == "bos_mismatch"


def two(one: str, other: str) -> bytes:
    """A header with `one` and `other` as its two members."""
    return raw(f"{{{one},{other}}}".encode(), bytes(32))


ROWS = f'"prompt_embeddings":{json.dumps(entry())}'
META = f'"__metadata__":{{"base":"{BASE}"}}'
NAN = struct.pack("<8f", *[0.0] * 5, float("nan"), 0.0, 0.0)

REFUSED = {
    # the frame
    "empty": (b"", "truncated"),
    "eight bytes": (bytes(8), "truncated"),
    "no header": (raw(b"", bytes(32)), "invalid_header"),
    "header longer than the file": (raw(b"{}", length=100), "truncated"),
    "header too large": (raw(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "header_too_large"),
    "header length of 2^63": (raw(b"{}", length=2**63), "header_too_large"),
    "bytes behind the tensors": (rows_file(data=bytes(33)), "trailing_bytes"),
    "tensor cut off": (rows_file(data=bytes(31)), "truncated"),
    # the JSON
    "spaces before": (raw(b"  {%b,%b}" % (META.encode(), ROWS.encode()), bytes(32)), "invalid_header"),
    "a byte order mark": (raw(b"\xef\xbb\xbf{%b,%b}" % (META.encode(), ROWS.encode()), bytes(32)), "invalid_header"),
    "a second object": (raw(b"{%b}{%b}" % (META.encode(), ROWS.encode()), bytes(32)), "invalid_header"),
    "a newline behind": (raw(b"{%b,%b}\n" % (META.encode(), ROWS.encode()), bytes(32)), "invalid_header"),
    "a list": (raw(b"[]"), "invalid_header"),
    "no UTF-8": (raw(b'{"\xff":1}'), "invalid_header"),
    "a lone surrogate": (two(META, '"\\ud800":1'), "invalid_header"),
    "nested too deep": (two(META, '"a":' + "[" * 5000 + "]" * 5000), "invalid_header"),
    "nested deeper than any stack": (two(META, '"a":' + "[" * 60000), "invalid_header"),
    "a number of 5000 digits": (two(META, '"a":' + "9" * 5000), "invalid_header"),
    "NaN": (two(META, '"a":NaN'), "non_finite"),
    "1e999": (two(META, '"a":1e999'), "non_finite"),
    "a tensor twice": (two(ROWS, ROWS), "duplicate_key"),
    "metadata twice": (raw(f"{{{META},{META},{ROWS}}}".encode(), bytes(32)), "duplicate_key"),
    "a metadata key twice": (two('"__metadata__":{"base":"a","base":"b"}', ROWS), "duplicate_key"),
    "dtype twice": (two(META, ROWS.replace('{"dtype"', '{"dtype":"F16","dtype"')), "duplicate_key"),
    # the tensors
    "no tensor": (raw({"__metadata__": {"base": BASE}}), "unexpected_tensor"),
    "17 tensors": (raw({f"t{i}": entry((1,), offsets=(4 * i, 4 * i + 4)) for i in range(17)}, bytes(68)),
                   "unexpected_tensor"),
    "another tensor": (raw({"weight": entry()}, bytes(32)), "unexpected_tensor"),
    "a tensor more": (two(ROWS, '"more":' + json.dumps(entry(offsets=(32, 64)))) + bytes(32), "unexpected_tensor"),
    "keys without values": (raw({"keys": entry((1, 1, 2, 4))}, bytes(32)), "unexpected_tensor"),
    "a path for a name": (raw({"../../x": entry()}, bytes(32)), "invalid_name"),
    "an empty name": (raw({"": entry()}, bytes(32)), "invalid_name"),
    "a NUL in a name": (raw({"prompt_embeddings\0": entry()}, bytes(32)), "invalid_name"),
    "an unknown field": (raw({"prompt_embeddings": {**entry(), "x": 1}}, bytes(32)), "invalid_header"),
    "a field missing": (raw({"prompt_embeddings": {"dtype": "F32", "shape": [2, 4]}}, bytes(32)), "invalid_header"),
    "a tensor that is a list": (raw({"prompt_embeddings": [1]}, bytes(32)), "invalid_header"),
    "F64": (rows_file(dtype="F64", shape=(1, 4)), "unsupported_dtype"),
    "I32": (rows_file(dtype="I32"), "unsupported_dtype"),
    "a dtype that is no string": (rows_file(dtype=["F32"]), "unsupported_dtype"),
    "a negative axis": (rows_file(shape=(-2, -4)), "invalid_shape"),
    "a float for an axis": (rows_file(shape=(2.0, 4)), "invalid_shape"),
    "a bool for an axis": (rows_file(shape=(True, 8)), "invalid_shape"),
    "an axis of 2^40 and one of 0": (rows_file(shape=(2**40, 0), offsets=(0, 0), data=b""), "invalid_shape"),
    "no axes": (rows_file(shape=(), offsets=(0, 4), data=bytes(4)), "invalid_shape"),
    "five axes": (rows_file(shape=(1, 1, 1, 2, 4)), "invalid_shape"),
    "2^62 x 4 rows": (rows_file(shape=(2**62, 4)), "shape_mismatch"),
    "a product that is 2^64 + 32": (rows_file(shape=(2**32, 2**30)), "shape_mismatch"),
    "fewer bytes than the shape": (rows_file(offsets=(0, 28), data=bytes(28)), "shape_mismatch"),
    "a hole": (rows_file(offsets=(4, 36), data=bytes(36)), "invalid_offsets"),
    "three offsets": (rows_file(offsets=(0, 32, 32)), "invalid_offsets"),
    "offsets the wrong way": (rows_file(offsets=(32, 0)), "shape_mismatch"),
    "overlapping tensors": (raw(dict.fromkeys(("keys", "values"), entry((1, 1, 2, 4))), bytes(32)), "invalid_offsets"),
    "rows with one axis": (rows_file(shape=(8,)), "shape_mismatch"),
    "rows with four axes": (rows_file(shape=(1, 1, 2, 4)), "shape_mismatch"),
    "NaN among the rows": (rows_file(data=NAN), "non_finite"),
    "infinity among the rows": (rows_file(data=struct.pack("<8f", float("-inf"), *[0.0] * 7)), "non_finite"),
    # the metadata
    "metadata that is a list": (two('"__metadata__":[]', ROWS), "invalid_metadata"),
    "metadata that is a number": (two(f'"__metadata__":{{"base":"{BASE}","level":4}}', ROWS), "invalid_metadata"),
    "an unknown key": (rows_file({"author": "me"}), "unknown_field"),
    "another format": (rows_file({"format": "promptstitch.v2"}), "unsupported_format"),
    "another kind": (rows_file({"kind": "kv"}), "kind_mismatch"),
    "a hidden size that is not": (rows_file({"hidden_size": "5"}), "hidden_size_mismatch"),
    "a hidden size in words": (rows_file({"hidden_size": "four"}), "invalid_metadata"),
    "a base that is no digest": (rows_file({"base": "llama"}), "invalid_metadata"),
    "a base in capitals": (rows_file({"base": "sha256:" + "BA" * 32}), "invalid_metadata"),
    "bos unknown": (rows_file({"bos": "both"}), "invalid_metadata"),
    "chat template unknown": (rows_file({"chat_template": "chatml"}), "invalid_metadata"),
    "weights that are no digest": (rows_file({"weights": "x"}), "invalid_metadata"),
    "a task that is a path": (rows_file({"task": "../etc"}), "invalid_metadata"),
    "a level that is not canonical": (rows_file({"level": "W4G128"}), "invalid_metadata"),
    "a time that is none": (rows_file({"created": "yesterday"}), "invalid_metadata"),
    "train that is a list": (rows_file({"train": "[]"}), "invalid_metadata"),
    "train with a key twice": (rows_file({"train": '{"a":{"b":1,"b":2}}'}), "duplicate_key"),
    "train with NaN": (rows_file({"train": '{"a":NaN}'}), "non_finite"),
    "train of 17 KiB": (rows_file({"train": '{"a":"%s"}' % ("x" * 17 * 1024)}), "invalid_metadata"),
    "train 40 deep": (rows_file({"train": '{"a":' + "[" * 40 + "]" * 40 + "}"}), "invalid_metadata"),
    "no base anywhere": (raw({"prompt_embeddings": entry()}, bytes(32)), "base_unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    data, code = REFUSED[name]
    with pytest.raises(InvalidArtifact) as refused:
        read_prompt(data)
    assert refused.value.code == code, refused.value.message


def test_the_table_is_wide():
    assert len(REFUSED) >= 25


def test_trailing_spaces_are_padding():
    assert read_prompt(raw(b"{%b,%b}   " % (META.encode(), ROWS.encode()), bytes(32))).prompt.shape == (2, 4)


class Explosive:
    """A pickle of it touches a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def foreign_files(canary: Path) -> dict[str, bytes]:
    torch_zip, npz = io.BytesIO(), io.BytesIO()
    torch.save({"prompt_embeddings": torch.zeros(2, 4)}, torch_zip)
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY")
    pickles = {f"pickle {protocol}": pickle.dumps(Explosive(canary), protocol) for protocol in range(6)}
    return {
        **pickles,
        "torch.save": torch_zip.getvalue(),
        "npz": npz.getvalue(),
        "npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}" + bytes(64),
        "gguf": b"GGUF\x03\x00\x00\x00" + bytes(64),
        "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(64),
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(64),
        "tar": b"x.safetensors".ljust(257, b"\0") + b"ustar\x0000" + bytes(255),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "json": b'{"prompt_embeddings": [[0.0]]}',
        "text": b"Answer as a pirate would, please.",
    }


def test_other_formats_are_refused_by_content_and_nothing_of_them_runs(tmp_path):
    canary = tmp_path / "canary"
    for name, data in foreign_files(canary).items():
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(InvalidArtifact) as refused:
            read_prompt(tmp_path / "x.safetensors")
        assert refused.value.code == "unsupported_format", name
        for wrapped in (rows_file() + data, data + rows_file(), struct.pack("<Q", len(data)) + data):
            with pytest.raises(InvalidArtifact):
                read_prompt(wrapped)
    assert not canary.exists()


class CountingFile(io.BytesIO):
    taken = 0

    def read(self, size=-1):
        data = super().read(size)
        self.taken += len(data)
        return data


def test_a_bloated_header_costs_nothing(tmp_path):
    path = tmp_path / "bloated.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 99_000_000) + b"{")
        stream.truncate(99_000_008)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(InvalidArtifact) as refused:
        read_prompt(path)
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.code == "header_too_large"
    assert seconds < 0.25  # single milliseconds in truth; ten minutes were the library's
    assert peak < 1 << 20


def test_only_length_and_header_are_read_before_the_verdict():
    bad = CountingFile(rows_file(shape=(2**30, 4), data=bytes(1 << 22)))
    with pytest.raises(InvalidArtifact):
        read_header(bad, 8 + (1 << 22))
    assert bad.taken <= 8 + MAX_HEADER_BYTES


def test_a_declared_shape_allocates_nothing():
    tracemalloc.start()
    for shape in ((2**62, 4), (2**31, 2**31), (2**20, 2**20), (1, 2**40)):
        with pytest.raises(InvalidArtifact):
            read_prompt(rows_file(shape=shape))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18


LIMITS = Limits(1000, 4, BASE, hidden_size=8, num_layers=2, num_kv_heads=1, head_dim=4, dtype="float16")


def test_what_fits_the_limits_passes(rows, kv):
    for prompt in (rows(1), kv(1)):
        assert read_prompt(encode_prompt(PromptFile(prompt)), LIMITS).prompt == prompt


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_bytes": 100}, "file_too_large"),
        ({"max_virtual_tokens": 2}, "too_many_virtual_tokens"),
        ({"base": OTHER}, "base_model_mismatch"),
    ],
)
def test_limits_of_both_kinds(rows, kv, limits, code):
    for prompt in (rows(1), kv(1)):
        with pytest.raises(InvalidArtifact) as refused:
            read_prompt(encode_prompt(PromptFile(prompt)), replace(LIMITS, **limits))
        assert refused.value.code == code


def test_limits_of_one_kind(rows, kv):
    for prompt, limits, code in (
        (rows(1), {"hidden_size": 9}, "hidden_size_mismatch"),
        (kv(1), {"num_layers": 3}, "shape_mismatch"),
        (kv(1), {"num_kv_heads": 2}, "shape_mismatch"),
        (kv(1), {"head_dim": 8}, "shape_mismatch"),
    ):
        with pytest.raises(InvalidArtifact) as refused:
            read_prompt(encode_prompt(PromptFile(prompt)), replace(LIMITS, **limits))
        assert refused.value.code == code


def test_values_must_be_finite_in_the_served_dtype_too():
    huge = rows_file(data=struct.pack("<8f", *[0.0] * 6, 70000.0, 0.0))
    assert read_prompt(huge, Limits(dtype="bfloat16")).prompt.shape == (2, 4)
    with pytest.raises(InvalidArtifact, match=r"prompt_embeddings\[1, 2\] is not finite as float16"):
        read_prompt(huge, Limits(dtype="float16"))


def test_a_file_of_another_base_is_not_rebound():
    file = read_prompt(rows_file(), default_base=OTHER)
    assert (file.prompt.base, file.bound) == (BASE, False)
    with pytest.raises(InvalidArtifact) as refused:
        read_prompt(rows_file(), Limits(base=OTHER), default_base=OTHER)
    assert (refused.value.code, refused.value.field) == ("base_model_mismatch", "base")


def test_what_could_not_be_read_cannot_be_made(rows):
    for wrong in ({"train": {"a": float("nan")}}, {"train": {"a": object()}}, {"level": "fp16"}, {"created": "now"}):
        with pytest.raises(InvalidArtifact):
            Provenance(**wrong)
    with pytest.raises(InvalidArtifact):
        PromptFile(rows(1, base="llama"))
