"""`promptstitch evaluate`: the figures of a plain transformers loop, the same tokens throughout, clear errors."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from support.exact import kv_cache
from support.served import prompt_bytes
from support.tiny import kv, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import lab.evaluate.conditions
import lab.evaluate.scorer
from lab.data.documents import digest
from lab.data.named import documents
from lab.data.splits import split
from lab.data.windows import cut
from lab.evaluate.score import NotFiniteLoss, score
from lab.report.evidence import gather
from llama.load import info, load
from llama.tokenizer import HubTokenizer
from prompts_store.file import PromptFile, Provenance, read_prompt, write_prompt

WORDS = "".join(f"Sentence {i} says {i * i % 97} and no more.\n" for i in range(60))
WINDOW = 64


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture
def pages(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {WORDS[i:]}"}) + "\n" for i in range(0, 600, 10)))
    return path


@pytest.fixture
def soft(model, base, tmp_path):
    """soft(kind, n=…, bos=…) -> a prompt file for the model."""

    def write(kind="rows", n=5, seed=0, **fields):
        config = info(model).config
        made = rows(n, config.hidden_size, seed, base=base, **fields) if kind == "rows" else None
        prompt = made or kv(n, config, seed, base=base, **fields)
        path = tmp_path / f"{kind}-{n}-{seed}-{prompt.bos}.safetensors"
        write_prompt(path, PromptFile(prompt, Provenance("demo", "dense", info(model).identity.weights, None, None)))
        return path

    return write


@torch.inference_mode()
def plain_loop(folder, prompt=None, bos=()):
    """(sum of losses, tokens) by transformers alone: 64 bytes a window, its first unscored, the last one dropped."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(WORDS, add_special_tokens=False).input_ids)
    total = count = 0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.cat((torch.tensor(bos, dtype=torch.long), ids[start : start + WINDOW]))
        embeds, cache = theirs.get_input_embeddings()(window[None]), None
        if prompt is not None and prompt.kind == "rows":
            embeds = torch.cat((prompt.tensors["prompt_embeddings"][None], embeds), 1)
        elif prompt is not None:
            cache = kv_cache(theirs, prompt)
        logits = theirs(inputs_embeds=embeds, past_key_values=cache).logits[0, -WINDOW:-1]
        total += float(F.cross_entropy(logits, window[-WINDOW + 1 :], reduction="sum"))
        count += WINDOW - 1
    return total, count


def test_a_part_of_the_text_is_what_learning_never_sees(answer, model, pages, tmp_path):
    told = {part: answer("evaluate", model, "--text", pages, "--part", part) for part in ("all", "report", "select")}
    assert [told[part]["split"] for part in told] == list(told)
    reported = split(documents(str(pages))).parts["report"]
    assert told["report"]["text"]["documents"] == len(reported)
    assert told["report"]["text"]["digest"] == digest(reported)
    assert told["all"]["text"]["documents"] == 60
    run = tmp_path / "run"
    answer("evaluate", model, "--text", pages, "--part", "select", "--run", run)
    assert not gather([run], None).of("evaluate")  # what chooses is never shown as what is reported


def test_a_run_that_was_cut_short_goes_on_and_a_finished_one_answers(answer, model, text, soft, tmp_path, monkeypatch):
    asked = ("evaluate", model, "--text", text, "--window", WINDOW, "--prompt", soft(), "--run", tmp_path / "run")
    whole, calls = lab.evaluate.scorer.score, []

    def dying(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise NotFiniteLoss("killed")
        return whole(*args, **options)

    monkeypatch.setattr(lab.evaluate.scorer, "score", dying)
    with pytest.raises(AssertionError):
        answer(*asked)
    told = answer(*asked)
    assert len(calls) == 3  # what was scored once is not scored again
    assert answer(*asked) == told
    assert len(calls) == 3
    monkeypatch.undo()
    fresh = answer(*asked[:-2])
    assert {**fresh, "seconds": 0} == {**told, "seconds": 0}
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["command"], config["weights"]) == ("evaluate", told["weights"])


@pytest.mark.parametrize(("kind", "bos"), [(None, None), ("rows", "none"), ("kv", "none"), ("rows", "after_prompt")])
def test_perplexity_is_that_of_a_plain_loop(answer, model, text, soft, kind, bos):
    file = kind and soft(kind, bos=bos)
    prompt = file and read_prompt(file).prompt
    given = ["--prompt", file] if file else []
    told = answer("evaluate", model, "--text", text, "--window", WINDOW, "--dtype", "float32", *given)
    total, count = plain_loop(model, prompt, (257,) if bos == "after_prompt" else ())
    assert told["scored_tokens"] == count
    assert told["nll_sum"] == pytest.approx(total, rel=1e-5)
    assert told["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert told["prompt_digest"] == (prompt and prompt.digest)
    assert (told["model"], told["level"]) == (info(model).identity.name, "dense")
    assert told["bytes"] > 0
    low, high = told["nll"]["interval"]
    assert low < total / count < high


def test_a_text_has_no_bos_unless_the_prompts_layout_says_so(answer, model_with_bos, text):
    told = answer("evaluate", model_with_bos, "--text", text, "--window", WINDOW, "--dtype", "float32")
    total, count = plain_loop(model_with_bos)
    assert (told["nll_sum"], told["scored_tokens"]) == (pytest.approx(total, rel=1e-5), count)


def test_json_lines_are_cut_by_document(answer, model, tmp_path):
    path = tmp_path / "docs.jsonl"
    records = [{"text": WORDS[:150]}, {"text": "short"}, {"text": WORDS[150:400]}]
    path.write_text("\n".join(map(json.dumps, records)))
    told = answer("evaluate", model, "--text", path, "--window", WINDOW)
    assert told["windows"] == 2 + 3
    assert told["text"] | {"digest": None, "source": None} == {
        "source": None,
        "digest": None,
        "form": "text",
        "documents": 3,
        "left_out": 1,
    }
    assert (told["nll"]["unit"], told["nll"]["units"]) == ("document", 2)


def test_beside_the_dense_model(answer, model, text, soft):
    """A level of the very model: what compression costs, what the prompt takes off, how far from dense all that is."""
    given = ("evaluate", model, "--level", "w3g32", "--text", text, "--window", WINDOW, "--dtype", "float32")
    plain = answer(*given, "--dense", model)
    assert plain["level"] == "w3g32"
    assert plain["kl"]["value"] > 0
    assert 0 < plain["top1_agreement"]["value"] < 1
    told = answer(*given, "--dense", model, "--prompt", soft(), "--dense-prompt", soft(seed=1))
    assert told["dense_perplexity"] == pytest.approx(plain["dense_perplexity"])
    assert told["conditions"]["without_prompt"]["perplexity"] == pytest.approx(plain["perplexity"])
    measures = told["recovery"]
    gap = math.log(plain["perplexity"]) - math.log(plain["dense_perplexity"])
    assert measures["gap"]["value"] == pytest.approx(gap, rel=1e-4)
    assert measures["gain"]["value"] == pytest.approx(told["gain"]["value"])
    assert measures["kl"]["value"] == pytest.approx(plain["kl"]["value"], rel=1e-4)
    assert told["dense_prompted_perplexity"] > 1


def test_a_window_may_fill_the_context(answer, model, soft, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("word " * 420)
    told = answer("evaluate", model, "--text", long, "--window", 2043, "--prompt", soft(n=5))
    assert told["scored_tokens"] == 2042


def test_the_dense_model_beside_itself(answer, model, text, tmp_path):
    given = ("evaluate", model, "--text", text, "--window", WINDOW, "--dtype", "float32", "--dense", model)
    for _ in range(2):  # the second time from the kept states
        told = answer(*given, "--cache", tmp_path / "cache")
        assert told["kl"]["value"] < 1e-5
        assert told["nll_above_dense"]["value"] == pytest.approx(0, abs=1e-4)
    assert len(list((tmp_path / "cache").glob("*.states"))) == 1


def test_controls_are_scored_on_the_same_tokens(answer, model, text, soft):
    told = answer("evaluate", model, "--text", text, "--window", WINDOW, "--prompt", soft("kv"), "--controls")
    names = {"without_prompt", "untrained", "end_of_text", "hard_sentence_1", "hard_sentence_2", "hard_sentence_3"}
    assert set(told["conditions"]) == names
    for each in told["conditions"].values():
        above = each["nll_above_ours"]
        assert math.log(each["perplexity"]) - math.log(told["perplexity"]) == pytest.approx(above["value"], abs=1e-4)
        assert above["interval"][0] <= above["value"] <= above["interval"][1]


def test_the_best_of_real_texts_is_chosen_on_other_documents_than_it_is_reported_on(
    answer, cli, model, pages, text, soft, tmp_path, monkeypatch
):
    asked = (
        "evaluate",
        model,
        "--text",
        pages,
        "--part",
        "report",
        "--window",
        WINDOW,
        "--prompt",
        soft(),
        "--controls",
    )
    seen = []
    real = lab.evaluate.conditions.best_prefix

    def watched(scorer, prompt, choice, progress):
        seen.append((choice, real(scorer, prompt, choice, progress)))
        return seen[-1][1]

    monkeypatch.setattr(lab.evaluate.conditions, "best_prefix", watched)
    told = answer(*asked, "--prefixes", 3, "--run", tmp_path / "run")
    (choice, (best, tried)), tokenizer = seen[0], HubTokenizer(model)
    parts = split(documents(str(pages))).parts
    learn, select = (cut(parts[part], tokenizer, WINDOW) for part in ("learn", "select"))
    assert {tuple(row) for row in choice.texts.ids.tolist()} == {tuple(row) for row in learn.ids.tolist()}
    assert {tuple(row) for row in choice.select.ids.tolist()} <= {tuple(row) for row in select.ids.tolist()}
    assert told["prefixes"] == {"tried": 3, "chosen_on": len(choice.select), "digest": choice.select.digest}
    assert len(tried) == 3
    reported = cut(parts["report"], tokenizer, WINDOW)
    found = score(load(model, dtype="float32", device="cpu").model, reported, best).perplexity
    assert told["conditions"]["best_text"]["perplexity"] == pytest.approx(found, rel=1e-2)
    assert answer(*asked, "--run", tmp_path / "other")["prefixes"]["tried"] == 16
    without = answer(*asked, "--prefixes", 0)
    assert "best_text" not in without["conditions"]
    assert "prefixes" not in without
    elsewhere = ("evaluate", model, *asked[6:], "--prefix-text", pages)
    assert "is itself reported on" in cli(*elsewhere, "--text", text).stderr
    text.write_text("".join(f"Another thing, {i}, was said.\n" for i in range(60)))
    assert answer(*elsewhere, "--text", text, "--prefixes", 2)["prefixes"]["tried"] == 2


def test_a_prompt_of_the_registry_is_resolved_as_a_server_does(answer, cli, model, text, soft, tmp_path):
    store = tmp_path / "store"
    answer("prompts", "push", soft(), "--task", "demo", "--store", store, "--level", "dense")
    told = answer("evaluate", model, "--text", text, "--window", WINDOW, "--prompt", "demo@1", "--store", store)
    assert told["prompt"]["task"] == "demo"
    assert told["prompt"]["resolution"] == "exact"
    assert told["prompt_digest"] == read_prompt(soft()).prompt.digest
    missing = cli("evaluate", model, "--text", text, "--prompt", "nothing", "--store", store)
    assert missing.exit_code != 0
    assert "nothing" in missing.stderr


def test_people_read_lines(cli, model, text):
    result = cli("evaluate", model, "--text", text, "--window", WINDOW)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert float(lines["perplexity"]) > 1
    assert "by window" in lines["nll"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ok \xff", "is not UTF-8: byte 3"),
        (b"short", "too short for one window of 512 tokens: the longest of 1 documents has 5"),
    ],
)
def test_bad_text(cli, model, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    result = cli("evaluate", model, "--text", path, "--json")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_what_does_not_go_together(cli, model, narrow_model, text, soft, tmp_path):
    def fails(*args):
        result = cli("evaluate", model, *args)
        assert result.exit_code in (1, 2)
        return result.stderr

    assert "say --text, or --tasks" in fails()
    assert "say --text, or --tasks" in fails("--text", "")
    assert "say --text, or --tasks" in fails("--tasks", " ,")
    assert "--seed" in fails("--text", text, "--seed", -1)
    assert "--controls is of use with --prompt only" in fails("--text", text, "--controls")
    alone = ("--text", text, "--prompt", soft(), "--window", WINDOW)
    assert "--prefixes is of use with --controls and --text only" in fails(*alone, "--prefixes", 3)
    assert "--part report or --prefix-text only" in fails(*alone, "--controls", "--prefixes", 3)
    assert "--dense is of use with --text only" in fails("--tasks", "boolq", "--dense", model)
    assert "is of base" in fails("--text", text, "--window", WINDOW, "--dense", narrow_model)
    assert "the context of 2048 is too short" in fails("--text", text, "--window", 2044, "--prompt", soft())
    other = tmp_path / "other.safetensors"
    other.write_bytes(prompt_bytes(0))
    assert "base" in fails("--text", text, "--prompt", other)
    assert "import-peft" in fails("--text", text, "--prompt", tmp_path)
    assert "--level" in fails("--text", text, "--level", "w9")


def test_a_loss_that_is_not_finite(cli, model, text, monkeypatch):
    def broken(model, windows, *args, **options):
        raise NotFiniteLoss("the loss of window 0 is not finite in torch.float16: try --dtype float32")

    monkeypatch.setattr("lab.evaluate.scorer.score", broken)
    result = cli("evaluate", model, "--text", text, "--window", WINDOW)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("try --dtype float32")
