"""Whole checkpoints: what is written loads, here and in transformers, and means what the solver decided."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.checkpoints import logits, model, save
from transformers import AutoModelForCausalLM

import lab.compress.compress
import lab.compress.folder
from lab.compress.block import DenseBlock, Walk
from lab.compress.compress import Order, compress, linear_weights, paper_bytes, planned
from lab.compress.job import LAYER, Job
from lab.compress.level import Level
from lab.errors import RunError
from lab.progress import silent
from lab.run import open_run
from llama.checkpoint import Checkpoint
from llama.errors import ModelError
from llama.fingerprint import weights_digest
from llama.load import load
from llama.manifest import Manifest

IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2))
PACKED = ("w2g32", "w3g64", "w4g64", "w4", "w8g64", "s50", "s2of4", "w4g64-s50", "w3-s4of8")


def fp32(folder: Path) -> torch.Tensor:
    return logits(load(folder, dtype="float32", device="cpu").model, IDS)


@pytest.mark.parametrize("biased", [False, True])
def test_tokens_walk_through_blocks_as_through_the_model(tmp_path, tokens, biased):
    reference = model(attention_bias=biased, mlp_bias=biased)
    checkpoint = Checkpoint(save(tmp_path / "model", reference))
    hidden = checkpoint.tensor("model.embed_tokens.weight")[tokens.ids].float()
    walk = Walk(checkpoint.config, tokens.real, torch.device("cpu"))
    for index in range(2):
        walk.through(DenseBlock.read(checkpoint, index, torch.device("cpu")), hidden, None)
    with torch.inference_mode():
        states = reference.model(tokens.ids, output_hidden_states=True).last_hidden_state
        found = reference.model.norm(hidden)
    torch.testing.assert_close(found[tokens.real], states[tokens.real], atol=2e-5, rtol=1e-4)


def test_padding_counts_nowhere(dense, tokens):
    moments = []
    for ids in (tokens.ids, torch.where(tokens.real, tokens.ids, 99)):
        checkpoint = Checkpoint(dense)
        hidden = checkpoint.tensor("model.embed_tokens.weight")[ids].float()
        block = DenseBlock.read(checkpoint, 0, torch.device("cpu"))
        seen = []
        Walk(checkpoint.config, tokens.real, torch.device("cpu")).through(
            block, hidden, lambda step, weight, found, seen=seen: seen.append(found) or weight
        )
        moments.append(seen)
    for one, other in zip(*moments, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("level", PACKED)
def test_packed_is_dense_in_fewer_bytes(compressed, level):
    packed, plain = compressed(level), compressed(level, "plain", export="dense")
    torch.testing.assert_close(fp32(packed), fp32(plain), atol=1e-4, rtol=0)
    manifest = Manifest.read(packed)
    assert manifest.level == level
    assert manifest.weights == weights_digest(packed)
    assert load(packed).identity.level == level


@pytest.mark.parametrize("level", ["w3g64", "w4g64", "w8g64", "w4"])
def test_transformers_reads_the_same(compressed, level):
    folder = compressed(level)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs, IDS), fp32(compressed(level, "plain", export="dense")))


def test_round_to_nearest_is_the_model_that_loading_makes(compressed, dense):
    folder = compressed("w3g64", method="rtn")
    assert torch.equal(fp32(folder), logits(load(dense, level="w3g64", dtype="float32", device="cpu").model, IDS))


@pytest.mark.parametrize("level", ["w3g64", "w4g64", "s50", "w4g64-s50"])
def test_every_layer_errs_less_than_with_the_baselines(compressed, level):
    methods = ["sparsegpt", "wanda", "magnitude"] if "s" in level else ["gptq", "rtn"]
    ours, *others = (errors(compressed(level, method, method=method, export="dense")) for method in methods)
    assert len(ours) == 12
    for theirs in others:
        assert all(one < other for one, other in zip(ours, theirs, strict=True))


def errors(folder: Path) -> list[float]:
    """What the run that made `folder` tells of each step."""
    return [
        layer["error"]
        for layer in json.loads((folder.parent / f"{folder.name}.run/figures.json").read_text())["layers"]
    ]


def test_what_surrounds_the_weights_comes_along(compressed, dense):
    folder = compressed("w4g64")
    manifest, source = Manifest.read(folder), Manifest.read(dense)
    assert (manifest.base, manifest.name) == (source.base, source.name)
    assert manifest.source == f"gptq of {source.weights}"
    assert (folder / "generation_config.json").read_bytes() == (dense / "generation_config.json").read_bytes()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    checkpoint, stored = Checkpoint(dense), Checkpoint(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.input_layernorm.weight"):
        assert torch.equal(stored.tensor(name), checkpoint.tensor(name))


def test_sizes_are_measured(dense, tokens, tmp_path):
    plan = planned(Order(dense, tmp_path / "out", "w4g64-s50", device="cpu"))
    with open_run(tmp_path / "run", {}) as run:
        _, sizes = compress(plan, tokens, run, silent)
        assert len(run.events(LAYER)) == len(run.figures["layers"]) == 12
    assert sizes.disk == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert sizes.resident == load(tmp_path / "out", device="cpu").resident_bytes
    assert sizes.paper_dense == 8 * sizes.paper
    weights = linear_weights(plan.checkpoint.config)
    assert sizes.paper == paper_bytes(weights, Level.parse("w4g64-s50")) == weights // 4


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("level", ["w4g64", "s50"])
@pytest.mark.parametrize("at", range(6))
def test_a_killed_run_goes_on_to_the_same_bytes(compressed, monkeypatch, level, at):
    """Killed before and after each shard is written: what was done is kept or done again, and nothing differs."""
    whole = compressed(level, "whole", export="dense")
    calls, add = iter(range(1, 99)), lab.compress.folder.GrowingFolder.add

    def dying(folder, number, tensors):
        if next(calls) + number == at + 1 and at % 2 == 0:
            raise Killed
        add(folder, number, tensors)
        if at % 2 and number == at // 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(lab.compress.folder.GrowingFolder, "add", dying)
        with pytest.raises(Killed):
            compressed(level, "broken", export="dense")
    broken = whole.with_name("broken")
    assert not broken.exists()
    assert same_bytes(whole, compressed(level, "broken", export="dense"))


def test_a_run_that_was_killed_after_its_folder_got_its_name_tells_its_sizes(compressed, monkeypatch):
    """It was refused ever after: the folder is there already."""
    whole = compressed("w4g64", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(lab.compress.compress, "load", lambda *_a, **_k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            compressed("w4g64", "broken")
    broken = whole.with_name("broken")
    assert broken.exists()
    monkeypatch.setattr(lab.compress.compress, "_solve", lambda *_a: pytest.fail("it was solved again"))
    assert same_bytes(whole, compressed("w4g64", "broken"))
    monkeypatch.undo()
    shutil.rmtree(broken.with_name("broken.run"))  # then it is somebody else's
    with pytest.raises(ModelError, match="not empty"):
        compressed("w4g64", "broken")


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.slow
def test_kill_9(dense, tokens, compressed, tmp_path):
    """The process itself is killed while the second block is solved."""
    script = """
        import os, signal, sys, torch
        from pathlib import Path
        import lab.compress.job as job
        from lab.compress.compress import Order, compress, planned
        from lab.progress import silent
        from lab.run import open_run

        solve, calls = job.compress_layer, iter(range(99))

        def dying(*args):
            if next(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return solve(*args)

        job.compress_layer = dying
        torch.set_num_threads(1)
        dense, out, run, ids, real = map(Path, sys.argv[1:])
        plan = planned(Order(dense, out, "w4g64", device="cpu"))
        load = lambda path, dtype: torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).view(16, 24)
        with open_run(run, plan.config("data")) as folder:
            compress(plan, job.Tokens(load(ids, torch.int64), load(real, torch.bool)), folder, silent)
    """
    for name, tensor in (("ids", tokens.ids), ("real", tokens.real)):
        (tmp_path / name).write_bytes(tensor.contiguous().numpy().tobytes())
    paths = [dense, tmp_path / "out", tmp_path / "out.run", tmp_path / "ids", tmp_path / "real"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert same_bytes(compressed("w4g64", "whole"), compressed("w4g64", "out"))
    finally:
        torch.set_num_threads(threads)


def test_a_full_disk_leaves_nothing_half(compressed, monkeypatch, tmp_path):
    save_file, calls = lab.compress.folder.save_file, iter(range(99))

    def full(tensors, path, metadata):
        if next(calls) == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(lab.compress.folder, "save_file", full)
        with pytest.raises(RunError, match=r"No space left.*make room.*same command again"):
            compressed("w4g64")
    assert not (tmp_path / "w4g64").exists()
    assert not list(tmp_path.rglob("model-*.part"))
    assert same_bytes(compressed("w4g64"), compressed("w4g64", "other"))


def test_orders_that_cannot_be_carried_out(compressed, dense, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ModelError, match="not empty"):
        compressed("w4g64", "full")
    with pytest.raises(ModelError, match="w4g64 would fit"):
        compressed("w4g128")
    with pytest.raises(ModelError, match="is w4g64 already"):
        compressed("w3g64", source=compressed("w4g64"))
    with pytest.raises(ModelError, match="no grid whose scales"):
        compressed("s50", clip=True)
    with pytest.raises(ModelError, match="export is 'gguf'"):
        compressed("w3g64", export="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "w4g64", "w4g64.run"]


def test_inputs_that_are_not_finite_name_the_block(tmp_path, compressed):
    broken = model()
    with torch.no_grad():
        broken.model.layers[0].input_layernorm.weight[:] = 1e30  # finite, but its square is not
    with pytest.raises(ModelError, match=r"block 0, qkv: the inputs of the layer are not finite"):
        compressed("w4g64", source=save(tmp_path / "broken", broken))


def test_a_job_stops_where_it_is_told(dense, tokens, tmp_path):
    """The first number is where it starts, so that a resumed run's progress is right from the beginning."""
    plan = planned(Order(dense, tmp_path / "out", "w4g64", device="cpu"))
    folder = lab.compress.folder.GrowingFolder(tmp_path / "out", 4)
    job = Job(plan.checkpoint, plan.recipe, {}, plan.storage, folder, plan.device)
    embedded = plan.checkpoint.tensor("model.embed_tokens.weight")[tokens.ids].float()
    with open_run(tmp_path / "run", {}) as run:
        steps = job.blocks(tokens, embedded, run)
        assert [next(steps), next(steps)] == [0, 1]
    with open_run(tmp_path / "run", {}) as run:
        assert list(job.blocks(tokens, embedded, run)) == [1, 2, 3]
    next((tmp_path / ".out.part").glob("model-00002*")).unlink()
    with open_run(tmp_path / "run", {}) as run, pytest.raises(RunError, match=r"lacks model-00002.*start anew"):
        next(job.blocks(tokens, embedded, run))


def test_two_that_write_one_folder_do_not_mix(tmp_path):
    """Both filled it shard by shard, and it came out as neither of them."""
    first = lab.compress.folder.GrowingFolder(tmp_path / "out", 2)
    with pytest.raises(RunError, match="another process is writing"):
        lab.compress.folder.GrowingFolder(tmp_path / "out", 2)
    del first  # however it ends
    lab.compress.folder.GrowingFolder(tmp_path / "out", 2)
