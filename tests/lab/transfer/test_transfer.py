"""A table of transfer: paired losses equal to those computed by hand, each scored once whatever is killed."""

from __future__ import annotations

import json
import random

import pytest
import torch
from support.checkpoints import model as reference
from support.checkpoints import save
from support.tiny import ByteTokenizer, kv, rows

from lab.data.documents import DataError, Document
from lab.errors import RunError
from lab.evaluate.score import score
from lab.progress import silent
from lab.run import open_run
from lab.transfer import transfer as module
from lab.transfer.prompts import Contender
from lab.transfer.samples import parts, sample, samples
from lab.transfer.transfer import models_of, transfer
from llama.config import LlamaConfig
from llama.errors import ModelError
from llama.load import load


def carried_out(order, folder, tell=lambda cell: None):
    with open_run(folder, order.config()) as run:
        return transfer(order, run, silent, tell)


class Bytes(ByteTokenizer):
    """One that ends answers."""

    eos_token_id = 256


@pytest.fixture
def scored(monkeypatch):
    """How many windows each call of `score` got."""
    counts = []

    def counting(model, windows, prompt=None, **options):
        counts.append(len(windows))
        return score(model, windows, prompt, **options)

    monkeypatch.setattr(module, "score", counting)
    return counts


def test_a_gain_is_the_paired_difference_of_the_same_tokens(order, models, contenders, pages, tmp_path):
    outcome = carried_out(order(), tmp_path)
    assert len(outcome.cells) == len(models) * len(contenders)
    for cell in outcome.cells:
        model = next(m for m in models if m.identity.weights == cell.place.weights)
        loaded = load(model.folder, level=model.level, dtype="float32", device="cpu").model
        plain, own = pages.layouts["none"], pages.layouts[cell.contender.prompt.bos]
        without, behind = score(loaded, plain), score(loaded, own, cell.contender.prompt)
        tokens = int(plain.scored.sum())
        assert int(own.scored.sum()) == cell.windows.scored_tokens == tokens
        assert cell.loss_without == pytest.approx(without.nll_sum / tokens, abs=1e-6)
        assert cell.loss == pytest.approx(behind.nll_sum / tokens, abs=1e-6)
        assert cell.gain.value == pytest.approx((without.nll_sum - behind.nll_sum) / tokens, abs=1e-6)
        assert cell.gain.low <= cell.gain.value <= cell.gain.high
        assert (cell.gain.units, cell.gain.unit) == (9, "document")
        assert cell.windows.digest == plain.digest


def test_layouts_score_the_same_text_whatever_stands_before_it(pages):
    plain, bos = pages.layouts["none"], pages.layouts["after_prompt"]
    assert bos.ids.shape[1] == plain.ids.shape[1] + 1
    assert torch.equal(plain.ids[plain.scored], bos.ids[bos.scored])


def test_a_bos_crowds_no_completion_out():
    """A document of just the window's length was left out behind a BOS, so that layouts did not compare."""
    answers = [Document(f"{i}", text="ask", completion="x" * length) for i, length in enumerate((4, 28, 29))]
    found = sample("answers", "select", answers, Bytes(), 32, ["after_prompt"])
    assert {bos: len(windows) for bos, windows in found.layouts.items()} == dict.fromkeys(found.layouts, 2)


def test_a_killed_run_measures_no_window_twice(order, contenders, pages, tmp_path, monkeypatch, scored):
    class Killed(BaseException):
        pass

    rounds = len(contenders) + 1
    whole = carried_out(order(), tmp_path / "whole")
    total = sum(scored)
    assert total == 3 * rounds * len(pages)
    scored.clear()

    counting = module.score

    def dying(*args, **options):
        if len(scored) == 7:
            raise Killed
        return counting(*args, **options)

    monkeypatch.setattr(module, "score", dying)
    with pytest.raises(Killed):
        carried_out(order(), tmp_path / "killed")
    monkeypatch.setattr(module, "score", counting)
    resumed = carried_out(order(), tmp_path / "killed")
    assert sum(scored) == total
    assert [cell.told() for cell in resumed.cells] == [cell.told() for cell in whole.cells]
    scored.clear()
    carried_out(order(), tmp_path / "killed")
    assert not scored


def test_models_are_loaded_one_at_a_time_and_only_where_something_is_missing(order, tmp_path, monkeypatch):
    loads = []

    def loading(folder, **options):
        loads.append(options["level"])
        return load(folder, **options)

    monkeypatch.setattr(module, "load", loading)
    carried_out(order(), tmp_path)
    assert loads == [None, "w4g64", "w3g64"]
    carried_out(order(), tmp_path)
    assert len(loads) == 3


def test_another_question_does_not_take_the_folder(order, contenders, tmp_path):
    carried_out(order(contenders=contenders[:1]), tmp_path)
    with pytest.raises(RunError, match="prompts"):
        carried_out(order(), tmp_path)


def test_a_budget_gives_every_prompt_equally_many_windows(order, models, contenders, pages, tmp_path, scored):
    few = carried_out(order(models=models[2:], budget=1e-9), tmp_path)
    assert {len(cell.windows) for cell in few.cells} == {module.SLICE}
    assert sum(scored) == module.SLICE * (len(contenders) + 1)
    more = carried_out(order(models=models[2:], budget=600.0), tmp_path)
    assert {len(cell.windows) for cell in more.cells} == {len(pages)}
    assert sum(scored) == len(pages) * (len(contenders) + 1)
    # All of the data is one data set, in whichever order it was scored.
    assert {cell.windows.digest for cell in more.cells} == {pages.layouts["none"].digest}


def test_a_prompt_that_cannot_stand_here_is_left_out_and_named(order, contenders, base, tmp_path):
    wide = Contender(rows(4, 64, 9, base=base), "wide@1", "wide", 1)
    long = Contender(rows(2040, 128, 9, base=base), "long@1", "long", 1)
    outcome = carried_out(order(contenders=[*contenders, wide, long]), tmp_path)
    assert len(outcome.cells) == 3 * len(contenders)
    assert {name for name, _, _ in outcome.left_out} == {"wide@1", "long@1"}
    whys = {name: why for name, _, why in outcome.left_out}
    assert "128" in whys["wide@1"]
    assert "window of 32" in whys["long@1"]


def test_a_prompt_that_breaks_the_arithmetic_is_left_out_and_the_others_are_measured(order, base, contenders, tmp_path):
    config = LlamaConfig.from_hf(reference().config.to_dict())
    wild = Contender(kv(2, config, 9, scale=1e38, base=base), "wild@1", "wild", 1)
    outcome = carried_out(order(contenders=[wild, *contenders]), tmp_path)
    assert len(outcome.cells) == 3 * len(contenders)
    assert {name for name, _, _ in outcome.left_out} == {"wild@1"}


def test_models_of_one_base_each_weights_once(dense, tmp_path):
    found = models_of([dense, dense], ["w4g64", "w3g64"])
    assert [model.identity.level for model in found] == ["w4g64", "w3g64"]
    assert [model.level for model in models_of([dense], [])] == [None]
    other = save(tmp_path / "other", reference(seed=1))
    (other / "promptstitch.json").write_text((other / "promptstitch.json").read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(ModelError, match="--base"):
        models_of([dense, other], [])


def test_data_is_dealt_by_site_or_all_of_one_kind(tmp_path):
    lone = tmp_path / "lone.txt"
    lone.write_text("a text of its own")
    (split, found), *rest = parts(f"{lone}:report").items()
    assert (split, len(found), rest) == ("report", 1, [])
    with pytest.raises(DataError, match=r"lone.txt:report"):
        parts(str(lone))


def test_one_split_of_the_same_data_is_given_once(tmp_path):
    """Both were kept under one name, and the sums of the one went on with windows of the other."""
    dice, file = random.Random(0), tmp_path / "pages.jsonl"
    texts = [" ".join(f"w{dice.randrange(10**6)}" for _ in range(20)) for _ in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = (None, ByteTokenizer(), 16, ["tokenizer"], None)
    assert [each.split for each in samples([str(file)], *asked)] == ["select", "report"]
    with pytest.raises(DataError, match="give it once"):
        samples([str(file), f"{file}:report"], *asked)
