"""What the engine promises around the tokens: limits, failures, caches, cancelling, draining."""

import math
import threading

import pytest
import torch
from support import tiny
from support.drive import ask, until
from support.exact import teacher_forced

from engine.api import ContextTooLong, EngineClosed, InvalidRequest, Overloaded
from engine.request import RequestDone, RequestFailed
from llama.config import LlamaConfig
from prompts_store.prompt import SoftPrompt

TEXT = list(b"The quick brown fox jumps over the lazy dog.")


def test_seeded_sampling_is_the_same_alone_and_in_a_batch(make_engine):
    engine = make_engine(max_batch_tokens=16)
    asked = [
        {"temperature": 1.0, "seed": i, "top_p": (1.0, 0.9)[i % 2], "prompt": (None, tiny.rows(7, 64))[i % 2]}
        for i in range(12)
    ]
    alone = [ask(engine, TEXT[: 5 + i], **fields).wait().tokens for i, fields in enumerate(asked)]
    together = [ask(engine, TEXT[: 5 + i], **fields) for i, fields in enumerate(asked)]
    assert [answer.wait().tokens for answer in together] == alone


def test_choices_of_one_request_differ_and_repeat(make_engine):
    engine = make_engine()
    first, second = (ask(engine, TEXT, n=4, temperature=1.0, seed=5).wait() for _ in range(2))
    assert first.tokens == second.tokens
    assert len({tuple(tokens) for tokens in first.tokens.values()}) == 4  # equal ones: chance below 1e-20
    assert first.last.completion_tokens == 64


def test_usage_counts_text_and_soft_tokens_apart(make_engine):
    done = ask(make_engine(), TEXT, tiny.rows(17, 64), max_tokens=3).wait().last
    assert (done.text_tokens, done.soft_tokens, done.completion_tokens) == (len(TEXT), 17, 3)


def test_logprobs_and_echo_equal_the_reference(make_engine, reference):
    for prompt in (None, tiny.rows(9, 64)):
        engine = make_engine(max_batch_tokens=8)  # the text is scored over several chunks
        answer = ask(engine, TEXT, prompt, max_tokens=5, logprobs=2, prompt_logprobs=1).wait()
        expected = teacher_forced(reference, TEXT[:1], [*TEXT[1:], *answer.tokens[0]], prompt).log_softmax(-1)
        told = [*answer.scored[1:], *answer.logprobs[0]]
        assert answer.scored[0].logprob is None
        assert [entry.token_id for entry in told] == [*TEXT[1:], *answer.tokens[0]]
        for entry, row in zip(told, expected, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert entry.top[0][0] == int(row.argmax())


def test_max_tokens_zero_scores_and_ends(make_engine):
    answer = ask(make_engine(), TEXT, max_tokens=0, prompt_logprobs=0).wait()
    assert (answer.tokens[0], answer.finish[0], len(answer.scored)) == ([], "length", len(TEXT))


def test_stop_token_min_tokens_and_ignore_eos(make_engine):
    engine = make_engine()
    free = ask(engine, TEXT, max_tokens=12).wait().tokens[0]
    stop = free[4]
    stopped = ask(engine, TEXT, max_tokens=12, stop_token_ids=(stop,)).wait()
    assert stopped.tokens[0] == free[: free.index(stop) + 1]
    assert (stopped.finish[0], stopped.stop_reason[0]) == ("stop", stop)
    late = ask(engine, TEXT, max_tokens=12, stop_token_ids=(stop,), min_tokens=12).wait()
    assert len(late.tokens[0]) == 12
    assert stop not in late.tokens[0]


def test_eos_ends_unless_ignored_and_waits_for_min_tokens(make_engine):
    engine = make_engine()
    bias = {"logit_bias": ((256, 1000.0),), "max_tokens": 6, "ignore_eos": False}
    ended = ask(engine, TEXT, **bias).wait()
    assert (ended.tokens[0], ended.text[0], ended.finish[0], ended.stop_reason[0]) == ([256], "", "stop", None)
    late = ask(engine, TEXT, **bias, min_tokens=3).wait()
    assert len(late.tokens[0]) == 4
    assert late.tokens[0][-1] == 256
    assert ask(engine, TEXT, **{**bias, "ignore_eos": True}).wait().tokens[0] == [256] * 6


def test_stop_string_ends_the_text(make_engine):
    engine = make_engine()
    free = ask(engine, TEXT, max_tokens=24).wait()
    stop = next(c for c in free.text[0][3:] if c != "�")
    cut = ask(engine, TEXT, max_tokens=24, stop=(stop,)).wait()
    assert cut.text[0] == free.text[0][: free.text[0].index(stop)]
    assert (cut.finish[0], cut.stop_reason[0]) == ("stop", stop)


def test_prefix_cache_is_used_and_keyed_by_prompt_and_namespace(make_engine):
    engine = make_engine()

    def cached(**where) -> int:
        return ask(engine, TEXT, where.pop("prompt", None), max_tokens=4, **where).wait().last.cached_tokens

    assert cached() == 0
    assert cached() == len(TEXT) - len(TEXT) % 4 - (4 if len(TEXT) % 4 == 0 else 0)
    assert cached(namespace="other") == 0
    assert cached(prompt=tiny.rows(6, 64, seed=1)) == 0
    assert cached(prompt=tiny.rows(6, 64, seed=1)) > 0
    assert cached(prompt=tiny.rows(6, 64, seed=2)) == 0  # same shape, other rows: another digest


def test_loaded_prompts_are_told_and_evicted_when_pages_are_short(make_engine):
    engine = make_engine(kv_bytes=64 * 2 * 2 * 4 * 2 * 16 * 4)  # 64 pages of 4
    prompts = [tiny.rows(40, 64, seed=i) for i in range(9)]
    for prompt in prompts:
        ask(engine, TEXT[:4], prompt, max_tokens=2).wait()
    loaded = engine.stats().loaded_prompts
    assert prompts[-1].digest in loaded
    assert prompts[0].digest not in loaded


def test_cancel_frees_pages_and_ends_silently(make_engine):
    engine = make_engine()
    answers = [ask(engine, TEXT, tiny.rows(33, 64), n=2, max_tokens=1500) for _ in range(6)]
    until(lambda: engine.stats().running > 0)
    for answer in answers:
        engine.cancel(answer.request.request_id)
    engine.cancel("never heard of")
    until(lambda: engine.stats().pages_used == 0 and engine.stats().running == engine.stats().waiting == 0)
    assert sum(engine.stats().aborted.values()) == 6
    assert ask(engine, TEXT).wait().finish[0] == "length"


def test_deadline_ends_running_and_waiting_requests(make_engine):
    engine = make_engine(max_running=1)
    answers = [ask(engine, TEXT, max_tokens=1900, n=8, timeout=t) for t in (0.2, 0.1, 0.0)]
    assert [answer.wait().last.code for answer in answers] == ["deadline"] * 3
    until(lambda: engine.stats().pages_used == 0)


def test_a_failing_step_fails_its_requests_and_nothing_else(make_engine, monkeypatch):
    engine = make_engine()
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda batch: (_ for _ in ()).throw(RuntimeError("broken on purpose")))
    prompt = tiny.rows(10, 64)
    failed = ask(engine, TEXT, prompt).wait().last
    assert isinstance(failed, RequestFailed)
    assert failed.code == "engine_error"
    assert "on purpose" not in failed.message
    monkeypatch.setattr(engine._runner, "run", run)
    assert engine.stats().pages_used == 0
    assert prompt.digest not in engine.stats().loaded_prompts  # its pages were never filled
    assert isinstance(ask(engine, TEXT, prompt).wait().last, RequestDone)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("part", ["runner", "scheduler"])
def test_an_engine_that_ends_by_itself_leaves_nobody_waiting(make_engine, monkeypatch, part):
    """Once what was sent to an engine whose device had failed waited for its deadline, if it had one."""
    engine = make_engine()
    monkeypatch.setattr(engine, "_device_works", lambda: False)
    owner, name = (engine._runner, "run") if part == "runner" else (engine._scheduler, "schedule")
    monkeypatch.setattr(owner, name, lambda _: (_ for _ in ()).throw(RuntimeError("broken on purpose")))
    assert isinstance(ask(engine, TEXT).wait().last, RequestFailed)
    engine._thread.join()
    with pytest.raises(EngineClosed):
        ask(engine, TEXT)


def test_output_that_is_not_finite_fails_its_own_request(make_engine, reference):
    engine = make_engine()
    shape = tiny.kv(3, LlamaConfig.from_hf(reference.config.to_dict())).shape
    huge = {name: torch.full(shape, 3e38) for name in ("keys", "values")}
    bad = SoftPrompt("kv", tiny.BASE, huge)  # finite itself, but not what attention makes of it
    good = ask(engine, TEXT, max_tokens=40)
    assert ask(engine, TEXT, bad, max_tokens=4).wait().last.code == "engine_error"
    expected = teacher_forced(reference, TEXT, good.wait().tokens[0], None).argmax(-1).tolist()
    assert good.tokens[0] == expected
    # its pages are used again by others, and nothing of it shines through
    again = [ask(engine, TEXT[i:], max_tokens=30) for i in range(20)]
    assert all(isinstance(answer.wait().last, RequestDone) for answer in again)


@pytest.mark.parametrize(
    ("token_ids", "fields", "field"),
    [
        ([], {}, "prompt"),
        ([260], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"stop_token_ids": (9999,)}, "stop_token_ids"),
        ([1], {"logit_bias": ((260, 1.0),)}, "logit_bias"),
        ([1], {"n": 65}, "n"),
        ([1], {"logprobs": 21}, "logprobs"),
        ([1], {"prompt": tiny.rows(3, 32)}, "prompt"),
        ([1], {"prompt": tiny.rows(513, 64)}, "prompt"),
        ([1], {"prompt": tiny.rows(3, 64, base="sha256:other")}, "prompt"),
    ],
)
def test_bad_requests_are_refused_by_field_and_leave_nothing(make_engine, token_ids, fields, field):
    engine = make_engine()
    with pytest.raises(InvalidRequest) as refused:
        ask(engine, token_ids, **fields)
    assert refused.value.field == field
    assert engine.stats().waiting == 0


def test_the_context_counts_soft_text_and_new_tokens(make_engine):
    engine = make_engine(max_model_len=64)
    prompt = tiny.rows(20, 64)
    with pytest.raises(ContextTooLong, match=r"20 soft tokens \+ 40 text tokens \+ 5"):
        ask(engine, [1] * 40, prompt, max_tokens=5)
    assert len(ask(engine, [1] * 40, prompt, max_tokens=4).wait().tokens[0]) == 4
    assert len(ask(engine, [1] * 40, prompt, max_tokens=None).wait().tokens[0]) == 4


def test_a_lone_request_may_fill_the_whole_page_budget(make_engine):
    engine = make_engine(kv_bytes=32 * 2 * 2 * 4 * 2 * 16 * 4)  # 32 pages of 4
    prompt = tiny.rows(6, 64)
    room = engine.info.max_model_len - 6 - 10
    assert len(ask(engine, [1] * 10, prompt, max_tokens=None).wait().tokens[0]) == room


def test_a_full_queue_says_when_to_come_back(make_engine):
    engine = make_engine(max_running=1, max_waiting=2)
    hold = ask(engine, TEXT, max_tokens=1900)
    until(lambda: engine.stats().running == 1)
    waiting = [ask(engine, TEXT) for _ in range(2)]
    with pytest.raises(Overloaded) as refused:
        ask(engine, TEXT)
    assert refused.value.retry_after > 0
    engine.cancel(hold.request.request_id)
    assert all(answer.wait().finish[0] == "length" for answer in waiting)


def test_close_drains_then_fails_the_rest(make_engine):
    engine = make_engine(max_running=1)
    short, long = ask(engine, TEXT, max_tokens=4), ask(engine, TEXT, max_tokens=1900, n=32)
    engine.close(drain=1.0)
    assert isinstance(short.wait().last, RequestDone)
    assert long.wait().last.code == "shutdown"
    with pytest.raises(EngineClosed):
        ask(engine, TEXT)


def test_a_sink_that_raises_costs_only_its_own_request(make_engine):
    engine = make_engine()
    bad = ask(engine, TEXT, max_tokens=1000)
    bad.sink = None  # the engine still holds the bound method; break what it writes to
    bad.events.put = None
    assert ask(engine, TEXT).wait().finish[0] == "length"
    until(lambda: engine.stats().running == 0)


def test_many_threads_submit_and_cancel(make_engine):
    engine = make_engine(max_running=8)
    errors = []

    def client(number: int) -> None:
        try:
            for i in range(10):
                answer = ask(engine, TEXT[: 1 + (number * 7 + i) % 40], max_tokens=6)
                if i % 3 == 0:
                    engine.cancel(answer.request.request_id)
                else:
                    answer.wait()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    until(lambda: engine.stats().pages_used == 0)


def test_kv_prompt_in_half_precision_pages_is_close_to_rows_path(make_engine, reference):
    """A kv prompt made from a rows prompt's own keys and values answers exactly like it."""
    engine = make_engine()
    soft = tiny.rows(10, 64, seed=3)
    keys, values = [], []
    attention = [layer.self_attn for layer in reference.model.layers]
    hooks = [a.k_proj.register_forward_hook(lambda _m, _i, out: keys.append(out)) for a in attention]
    hooks += [a.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out)) for a in attention]
    with torch.inference_mode():
        reference(inputs_embeds=soft.tensors["prompt_embeddings"][None])
    for hook in hooks:
        hook.remove()

    def heads(out: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([t[0].view(10, 2, 16).transpose(0, 1) for t in out]).clone().contiguous()

    deep = SoftPrompt("kv", tiny.BASE, {"keys": heads(keys), "values": heads(values)})
    assert ask(engine, TEXT, deep).wait().tokens == ask(engine, TEXT, soft).wait().tokens


def test_timings_add_up(make_engine):
    timings = ask(make_engine(), TEXT, max_tokens=8).wait().last.timings
    assert all(value >= 0 and math.isfinite(value) for value in (timings.queued, timings.prefill, timings.decode))


def test_tokens_of_a_client_that_left_are_counted(make_engine):
    """Only what ended well was: a server under cancelled streams seemed idle."""
    engine = make_engine()
    answer = ask(engine, TEXT, max_tokens=900)
    for _ in range(20):
        answer.events.get(timeout=10)
    engine.cancel(answer.request.request_id)
    until(lambda: engine.stats().running == 0)
    assert engine.stats().prompt_tokens == len(TEXT)
    assert engine.stats().generation_tokens >= 20
