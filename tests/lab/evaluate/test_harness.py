"""lm-eval through our class gives what it gives through transformers, and behind a prompt what transformers gives."""

from __future__ import annotations

import json

import pytest
import torch
from support.exact import teacher_forced
from support.hub import tensors, write_checkpoint
from support.tiny import kv, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lab.data.documents import DataError
from lab.evaluate.harness import PromptedLM
from lab.evaluate.tasks import offline, run_tasks
from llama.load import load
from llama.pull import pull
from llama.tokenizer import HubTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
TASKS = ("hellaswag", "piqa", "arc_easy", "boolq", "openbookqa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A context of 128 tokens, one EOS, and weights sharp enough that answers vary."""
    state = {name: tensor * 3 if tensor.ndim == 2 else tensor for name, tensor in tensors().items()}
    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "model", state=state)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return pull(str(folder))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return HubTokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of data with a dozen items of each task, in the forms that SOURCES names."""
    root = tmp_path_factory.mktemp("data")
    made = {
        "hellaswag/validation.jsonl": lambda i: {
            "context": f"A man sits [header] number {i}. he",
            "ctx_b": "he",
            "activity_label": "Sitting",
            "choices": [f"goes {i}.", f"runs  {i * 7}.", "stays [title] put.", f"is {i}"],
            "answer": i % 4,
        },
        "piqa/validation.jsonl": lambda i: {
            "question": f"How to open {i}?",
            "choices": [f"Pull {i}", f"Push {i} hard"],
            "answer": i % 2,
        },
        "arc_easy/validation.jsonl": lambda i: {
            "question": f"Which is number {i}?",
            "choices": [f"one {i}", "two", f"three {i * 5}"],
            "answer": i % 3,
        },
        "boolq/validation.jsonl": lambda i: {
            "context": f"Title -- text {i * i}",
            "question": f"is it {i}",
            "choices": ["no", "yes"],
            "answer": i % 2,
        },
        "openbookqa/test.jsonl": lambda i: {
            "question": f"Frogs number {i}",
            "choices": [f"eat {i}", f"sleep {i * 3}", "swim", "fly"],
            "answer": i % 4,
        },
        "openbookqa/train.jsonl": lambda i: {"question": f"Frogs number {i + 10}", "choices": ["a"], "answer": 0},
    }
    for name, record in made.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(json.dumps({"id": i, **record(i)}) for i in range(12)))
    return root


def requests(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(args)]


PAIRS = [
    ("The frog", " jumps"),
    ("The frog ", "sleeps"),
    ("", "nothing before"),
    ("a", "b"),
    ("x" * 300, " long context"),
    ("The frog", " jumps over it"),
]


def test_likelihoods_are_those_of_transformers(loaded, tokenizer, theirs):
    asked = requests("loglikelihood", *PAIRS)
    ours, expected = PromptedLM(loaded, tokenizer).loglikelihood(asked), theirs.loglikelihood(asked)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-3)


def test_rolling_likelihoods_are_those_of_transformers(loaded, tokenizer, theirs):
    """Also of a text longer than the context, cut as lm-eval cuts it."""
    asked = requests("loglikelihood_rolling", ("short",), ("A long one. " * 220,))
    ours, expected = PromptedLM(loaded, tokenizer).loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked)
    assert ours == pytest.approx(expected, rel=1e-4)


def test_texts_are_those_of_transformers(loaded, tokenizer, theirs):
    options = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", ("The frog", options), ("Another text", options))
    assert PromptedLM(loaded, tokenizer).generate_until(asked) == theirs.generate_until(asked)


def test_the_tasks_are_those_of_transformers(loaded, tokenizer, theirs, root):
    ours = run_tasks(PromptedLM(loaded, tokenizer), TASKS, root)
    tasks = {name: offline(name, root)[0] for name in TASKS}
    told = evaluator.evaluate(
        lm=theirs, task_dict={"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=0, log_samples=True
    )
    for name in TASKS:
        assert ours[name].accuracy.value == told["results"][name]["acc,none"]
        if name != "boolq":
            assert ours[name].normalised.value == told["results"][name]["acc_norm,none"]
        correct = sorted(told["samples"][name], key=lambda sample: sample["doc_id"])
        assert ours[name].correct == tuple(sample["acc"] > 0 for sample in correct)


@pytest.mark.parametrize("kind", ["rows", "kv"])
def test_behind_a_prompt(loaded, tokenizer, theirs, kind):
    base, config = loaded.identity.base, loaded.model.config
    prompt = rows(6, config.hidden_size, base=base) if kind == "rows" else kv(6, config, base=base)
    lm = PromptedLM(loaded, tokenizer, prompt)
    assert lm.max_length == config.max_len - 6
    for (context, wanted), (value, greedy) in zip(
        PAIRS[:2], lm.loglikelihood(requests("loglikelihood", *PAIRS[:2])), strict=True
    ):
        whole, before = tokenizer.encode(context + wanted), len(tokenizer.encode(context.rstrip()))
        logits = teacher_forced(theirs.model, whole[:before], whole[before:], prompt).log_softmax(-1)
        target = torch.tensor(whole[before:])
        assert value == pytest.approx(float(logits.gather(1, target[:, None]).sum()), rel=1e-4)
        assert greedy == bool((logits.argmax(-1) == target).all())
    options = {"until": [], "max_gen_toks": 5, "do_sample": False}
    (text,) = lm.generate_until(requests("generate_until", ("The frog", options)))
    (plain,) = PromptedLM(loaded, tokenizer).generate_until(requests("generate_until", ("The frog", options)))
    assert text != plain


def test_items_are_fixed_and_overlaps_left_out(root):
    task, floor, digest = offline("openbookqa", root, items=5)
    again, _, same = offline("openbookqa", root, items=5)
    asked = [document["query"] for document in task.dataset["test"]]
    assert asked == [document["query"] for document in again.dataset["test"]]
    assert digest == same != offline("openbookqa", root, items=6)[2]
    whole = [document["query"] for document in offline("openbookqa", root)[0].dataset["test"]]
    assert whole[:5] == asked
    assert len(whole) == 10
    assert not {"Frogs number 10", "Frogs number 11"} & set(whole)
    assert 0.2 <= floor <= 1


def test_hellaswag_is_asked_as_lm_eval_asks_it(root):
    (first, *_) = offline("hellaswag", root)[0].dataset["test"]
    assert first["query"].startswith("Sitting: A man sits number ")
    assert first["query"].endswith(". He")
    assert "stays.  put." not in first["choices"]
    assert "stays. put." in first["choices"]  # " [title]" becomes ". "


def test_tasks_that_cannot_be_had(loaded, tokenizer, root, tmp_path):
    lm = PromptedLM(loaded, tokenizer)
    with pytest.raises(DataError, match="--tasks nonsense"):
        run_tasks(lm, ["nonsense"], root)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text('{"id": 1, "question": "x", "answer": 0}')
    with pytest.raises(DataError, match="a record lacks 'choices'"):
        run_tasks(lm, ["piqa"], tmp_path)
    with pytest.raises(DataError, match="which this engine does not know"):
        lm.generate_until(requests("generate_until", ("x", {"until": [], "num_beams": 4})))
