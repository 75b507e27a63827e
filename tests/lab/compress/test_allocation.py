"""Layers of unequal levels: measured, dealt out at equal bytes, written, and read here and in transformers."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import logits, model, save
from transformers import AutoModelForCausalLM

import lab.compress.compress
from lab.compress.allocation import allocate
from lab.compress.block import STEPS, step_shapes
from lab.compress.job import LAYER, Tokens
from lab.compress.level import Bits, Level
from lab.compress.methods import METHODS, Recipe, compress_layer
from lab.compress.sensitivity import sensitivity
from lab.progress import silent
from llama.checkpoint import Checkpoint
from llama.errors import ModelError
from llama.load import load

IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2))
SHAPES = {"a": ([8], 64), "b": ([8, 8], 128)}
W3 = Level.parse("w3g64")


def total(chosen: dict, shapes=SHAPES) -> int:
    return sum(sum(shapes[step][0]) * level.row_bytes(shapes[step][1]) for (_, step), level in chosen.items())


@pytest.mark.parametrize("name", ["w3g64", "w4", "s50", "w4g64-s50"])
def test_no_more_bytes_than_everywhere_the_same(name):
    level = Level.parse(name)
    choices, layers = level.alternatives(), [(block, step) for block in range(3) for step in SHAPES]
    assert level in choices
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        heavy = torch.rand(len(layers), generator=draw).exp().tolist()
        costs = {
            layer: [weight / choice.row_bytes(64) ** 2 for choice in choices]
            for layer, weight in zip(layers, heavy, strict=True)
        }
        chosen = allocate(costs, choices, SHAPES, level)
        assert total(chosen) <= total(dict.fromkeys(layers, level))
        cost = sum(costs[layer][choices.index(found)] for layer, found in chosen.items())
        assert cost <= sum(costs[layer][choices.index(level)] for layer in layers) + 1e-12


def test_where_the_bytes_just_fit_it_is_the_best_there_is():
    choices, layers = W3.alternatives()[:3], [(0, "a"), (1, "a"), (2, "a")]
    costs = {layers[0]: [9.0, 2.0, 0.5], layers[1]: [3.0, 1.0, 0.3], layers[2]: [1.0, 0.5, 0.4]}
    chosen = allocate(costs, choices, SHAPES, W3)
    fitting = [
        picks
        for picks in itertools.product(range(3), repeat=3)
        if total({layer: choices[at] for layer, at in zip(layers, picks, strict=True)})
        <= total(dict.fromkeys(layers, W3))
    ]
    best = min(fitting, key=lambda picks: sum(costs[layer][at] for layer, at in zip(layers, picks, strict=True)))
    assert chosen == {layer: choices[at] for layer, at in zip(layers, best, strict=True)}


def test_what_a_layer_costs_is_what_the_predictions_move(tmp_path):
    """To second order and in expectation: within a third, over 4,096 tokens whose labels are drawn once."""
    checkpoint = Checkpoint(save(tmp_path / "model", reference := model(seed=3)))
    ids = torch.randint(0, 256, (64, 65), generator=torch.Generator().manual_seed(0))[:, :64]
    real = torch.ones_like(ids, dtype=torch.bool)
    real[::4, 48:] = False
    embedded = reference.model.embed_tokens.weight.detach()[ids]
    cheap = Recipe(level := Level.parse("w4g64"), METHODS["rtn"], clip=True)
    costs = sensitivity(
        checkpoint, Tokens(ids, real), embedded.clone(), [level], reference.lm_head.weight.detach(), silent
    )
    assert set(costs) == {(block, step) for block in range(2) for step in STEPS}
    with torch.no_grad():
        plain = reference(ids).logits[real].log_softmax(-1)
        for (block, step), (cost,) in costs.items():
            layers = [reference.model.layers[block].get_submodule(name) for name in STEPS[step]]
            seen = []
            hook = layers[0].register_forward_pre_hook(lambda layer, inputs, seen=seen: seen.append(inputs[0][real]))
            reference(ids)
            hook.remove()
            kept = [layer.weight.clone() for layer in layers]
            for layer in layers:
                layer.weight.copy_(compress_layer(layer.weight, seen[0].t() @ seen[0], cheap).weight)
            moved = reference(ids).logits[real].log_softmax(-1)
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
            divergence = float(F.kl_div(moved, plain, log_target=True, reduction="batchmean"))
            assert cost == pytest.approx(divergence, rel=0.34)


@pytest.mark.parametrize("level", ["w3g64", "w4", "s50", "w4g64-s50"])
def test_unequal_layers_are_written_and_read(compressed, level):
    uneven = compressed(level, "uneven", allocation="sensitivity")
    plain = compressed(level, "plain", allocation="sensitivity", export="dense")
    loaded = load(uneven, dtype="float32", device="cpu")
    ours = logits(loaded.model, IDS)
    torch.testing.assert_close(ours, logits(load(plain, dtype="float32", device="cpu").model, IDS), atol=1e-4, rtol=0)
    assert loaded.identity.level == level
    figures = json.loads((uneven.parent / "uneven.run/figures.json").read_text())
    assert len({choice for _, _, choice in figures["allocated"]}) > 1
    assert loaded.disk_bytes <= load(compressed(level)).disk_bytes + 4096  # the longer config.json
    if "s" not in level:
        theirs = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32)
        torch.testing.assert_close(logits(theirs, IDS), ours)


def test_the_shares_are_those_that_the_configuration_names(compressed):
    config = json.loads((compressed("s50", allocation="sensitivity") / "config.json").read_text())
    keep = config["quantization_config"]["keep"]
    assert keep
    assert 32 not in keep.values()


def test_it_helps_where_layers_differ(compressed, tmp_path):
    """One layer whose outputs all else hangs on: with bits where they count the predictions move less."""
    source = model(seed=1, num_hidden_layers=3)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "o_proj"):
            source.model.layers[1].self_attn.get_submodule(name).weight.mul_(0.01)
        source.model.layers[0].mlp.down_proj.weight.mul_(3)
    dense = save(tmp_path / "dense", source)
    with torch.no_grad():
        wanted = source(IDS[None]).logits[0].log_softmax(-1)
    moved = {}
    for allocation in ("uniform", "sensitivity"):
        folder = compressed("w3g64", allocation, source=dense, allocation=allocation)
        found = logits(load(folder, dtype="float32", device="cpu").model, IDS).log_softmax(-1)
        moved[allocation] = float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))
    assert moved["sensitivity"] < 0.9 * moved["uniform"]


def test_a_run_that_goes_on_measures_no_second_time(compressed, monkeypatch):
    whole = compressed("w3g64", "whole", allocation="sensitivity")

    class Killed(Exception):
        pass

    def fall(self, index, *rest):
        if index == 1:
            raise Killed
        return shard(self, index, *rest)

    job = lab.compress.compress.Job
    shard = job._shard
    monkeypatch.setattr(job, "_shard", fall)
    with pytest.raises(Killed):
        compressed("w3g64", "cut", allocation="sensitivity")
    monkeypatch.setattr(job, "_shard", shard)
    monkeypatch.setattr(lab.compress.compress, "sensitivity", None)
    cut = compressed("w3g64", "cut", allocation="sensitivity")
    for file in sorted(whole.glob("*.safetensors")):
        assert (cut / file.name).read_bytes() == file.read_bytes()
    events = (cut.parent / "cut.run/log.jsonl").read_text().splitlines()
    assert sum(json.loads(event)["event"] == LAYER for event in events) == 12


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ("s2of4", {"allocation": "sensitivity"}, "--allocation uniform"),
        ("w3g64", {"allocation": "sensitivity", "method": "rtn"}, "looks at no text"),
        ("w3g64", {"allocation": "best"}, "uniform, sensitivity"),
    ],
)
def test_orders_that_cannot_be_carried_out(compressed, level, options, message):
    with pytest.raises(ModelError, match=message):
        compressed(level, **options)


def test_alternatives_take_as_many_bytes_as_they_say(dense):
    shapes = step_shapes(Checkpoint(dense).config)
    assert {len(Level.parse(name).alternatives()) for name in ("w3g64", "w4g128")} == {4}
    for level in (W3, replace(W3, grid=Bits(8, 64))):
        assert level.row_bytes(shapes["down"][1]) == shapes["down"][1] * level.grid.bits // 8
