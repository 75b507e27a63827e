"""Text and ids, as transformers' own tokenizer of the same folder gives them."""

import contextlib
import threading

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from llama.errors import BrokenCheckpoint
from llama.fingerprint import text_digest
from llama.tokenizer import HubTokenizer

TEXTS = ["the cat", "", "  two  spaces\n\ttab ", "é🎉 naïve 日本", "<s>the</s>", "that hat\x00"]


def rewrite_tokenizer(folder, change):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


def add_bos(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_encode_follows_transformers_and_the_layout(make_checkpoint, text, adds_bos):
    folder = make_checkpoint()
    if adds_bos:
        rewrite_tokenizer(folder, add_bos)
    tokenizer, reference = HubTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    bare = reference(text, add_special_tokens=False).input_ids
    assert tokenizer.encode(text) == reference(text).input_ids == ([0] if adds_bos else []) + bare
    assert tokenizer.encode(text, "none") == bare
    after = tokenizer.encode(text, "after_prompt")
    assert after == (bare if bare[:1] == [0] else [0, *bare])
    assert after[0] == 0
    assert 0 not in after[1:]


def test_after_prompt_needs_a_bos(make_checkpoint):
    folder = make_checkpoint()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="no BOS"):
        HubTokenizer(folder).encode("the", "after_prompt")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_chat_is_the_template_and_nothing_more(make_checkpoint, adds_bos):
    """A template that writes the BOS itself must not get a second one from the tokenizer."""
    folder = make_checkpoint()
    if adds_bos:
        rewrite_tokenizer(folder, add_bos)
    tokenizer = HubTokenizer(folder)
    ids = tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    assert ids == tokenizer.encode("<s>user\nthe cat</s>\n<s>assistant\n", "none")
    assert ids.count(0) == 2


@pytest.mark.parametrize(
    "messages", [[{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 5}]]
)
def test_a_template_that_refuses_raises_value_error(make_checkpoint, messages):
    with pytest.raises(ValueError, match="template"):
        HubTokenizer(make_checkpoint()).encode_chat(messages)


def test_no_template(make_checkpoint):
    tokenizer = HubTokenizer(make_checkpoint(template=None))
    assert tokenizer.chat_template_digest == "none"
    with pytest.raises(ValueError, match="template"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_a_template_cannot_reach_the_interpreter(make_checkpoint):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="template"):
        HubTokenizer(make_checkpoint(template=escape)).encode_chat([{"role": "user", "content": "x"}])


def test_template_digest_is_that_of_its_text(make_checkpoint):
    tokenizer = HubTokenizer(make_checkpoint(template="{{ 'x' }}"))
    assert tokenizer.chat_template_digest == text_digest("{{ 'x' }}")


def test_special_ids(make_checkpoint):
    folder = make_checkpoint()
    tokenizer = HubTokenizer(folder)
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == {1, 7}
    (folder / "generation_config.json").unlink()
    assert HubTokenizer(folder).eos_token_ids == {1}
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert HubTokenizer(folder).eos_token_ids == {1, 5}


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_the_bytes_of_the_text(make_checkpoint, text):
    tokenizer = HubTokenizer(make_checkpoint())
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(ids) == text.replace("<s>", "").replace("</s>", "")


def test_every_byte_of_a_byte_level_vocabulary(make_checkpoint):
    """GPT-2 maps bytes that do not print to U+0100 and on; a wrong order would swap control bytes silently."""
    tokenizer = HubTokenizer(make_checkpoint())
    single = [tokenizer.token_bytes(i) for i in range(2, 258)]
    assert sorted(single) == [bytes([i]) for i in range(256)]
    for value in (0, 10, 32, 127, 128, 160, 173, 255):
        text = bytes([value]).decode("latin-1")
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


@pytest.mark.parametrize("token_id", [-1, 300, 10**9])
def test_unknown_ids_have_no_bytes(make_checkpoint, token_id):
    """Embedding tables are padded: a sampled id beyond the vocabulary once failed its whole batch."""
    assert HubTokenizer(make_checkpoint()).token_bytes(token_id) == b""


def test_special_ids_are_those_that_decode_leaves_out(make_checkpoint):
    tokenizer = HubTokenizer(make_checkpoint())
    assert tokenizer.special_token_ids == {0, 1}
    assert tokenizer.decode(sorted(tokenizer.special_token_ids)) == ""


def test_sentencepiece_with_byte_fallback(make_checkpoint):
    """Llama 1 and 2: a lower-one-eighth block for a space, <0xNN> for bytes without a piece."""
    folder = make_checkpoint()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "\u2581a", "b"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = HubTokenizer(folder)
    ids = ours.encode("a b🎉")
    assert b"".join(map(ours.token_bytes, ids)) == " a b🎉".encode()
    assert ours.decode(ids) == "a b🎉"
    assert ours.token_bytes(vocab["<0x0A>"]) == b"\n"
    assert ours.token_bytes(vocab["<s>"]) == b"<s>"


def test_threads_do_not_disturb_one_another(make_checkpoint):
    tokenizer = HubTokenizer(make_checkpoint())
    texts = [f"the cat {i} on the mat" for i in range(50)]
    alone, wrong = [tokenizer.encode(text) for text in texts], []

    def work(offset):
        for i in range(300):
            at = (i + offset) % len(texts)
            bos = ("tokenizer", "none", "after_prompt")[i % 3]
            expected = [0, *alone[at]] if bos == "after_prompt" else alone[at]
            if tokenizer.encode(texts[at], bos) != expected or tokenizer.decode(expected) != texts[at]:
                wrong.append((at, bos))

    threads = [threading.Thread(target=work, args=(7 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_folder_without_tokenizer_is_named(tmp_path, make_checkpoint):
    folder = make_checkpoint()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BrokenCheckpoint, match="tokenizer"):
        HubTokenizer(folder)


def test_code_in_a_checkpoint_is_never_run(make_checkpoint):
    folder = make_checkpoint()
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: ...")
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": [null, "evil.T"]}, "tokenizer_class": "T", "bos_token": "<s>"}'
    )
    with contextlib.suppress(BrokenCheckpoint):
        HubTokenizer(folder)
    assert not marker.exists()


@pytest.mark.slow
def test_bytes_of_the_embedded_vocabulary_are_what_it_decodes(embedded):
    """A few bytes are no tokens of this vocabulary, for which it was once taken for a sentencepiece one."""
    tokenizer = HubTokenizer(embedded)
    text = "Grüße, 世界! 🎉 It is 100 % fine.\n\tEnd"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids) == text
    ordinary = [i for i in range(0, 49152, 7) if i not in tokenizer.special_token_ids]
    assert b"".join(map(tokenizer.token_bytes, ordinary)).decode(errors="replace") == tokenizer.decode(ordinary)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"model": {"type": "Nope"}}'),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": '),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
    ],
)
def test_broken_files_are_named(make_checkpoint, name, text):
    folder = make_checkpoint("broken")
    (folder / name).write_text(text)
    with pytest.raises(BrokenCheckpoint):
        HubTokenizer(folder)
