"""Windows lie inside a document, and their layout is that of serving: the ids that a server would make."""

from __future__ import annotations

import json

import pytest
import torch
from support.hub import write_checkpoint
from support.tiny import ByteTokenizer as Bytes

from lab.data.documents import DataError, Document, Turn
from lab.data.windows import cut
from llama.tokenizer import HubTokenizer


class ByteTokenizer(Bytes):
    """The same as the lab sees it; `adds` puts a BOS before plain text."""

    eos_token_id = 256

    def __init__(self, adds=False):
        self.adds = adds

    def encode(self, text, bos="tokenizer"):
        ids = list(text.encode())
        return [257, *ids] if bos == "after_prompt" or (bos == "tokenizer" and self.adds) else ids

    def chat_text(self, messages, *, asking=True):
        return "".join(f"<{m['role']}>{m['content']}\n" for m in messages) + ("<assistant>" if asking else "")


def text(words, number=0):
    return Document(str(number), str(number), words)


def test_windows_never_cross_a_document_and_the_rest_is_dropped():
    data = cut([text("abcdefghij"), text("xy"), text("klmnop")], ByteTokenizer(), 4)
    assert [bytes(row).decode() for row in data.ids.tolist()] == ["abcd", "efgh", "klmn"]
    assert data.document.tolist() == [0, 0, 2]
    assert data.left_out == 1
    assert data.scored.tolist() == [[False, True, True, True]] * 3
    assert (len(data), data.scored_tokens, data.lengths.tolist()) == (3, 9, [4, 4, 4])


@pytest.mark.parametrize(
    ("bos", "adds", "head"),
    [
        ("none", True, []),
        ("tokenizer", False, []),
        ("tokenizer", True, [257]),
        ("after_prompt", False, [257]),
        ("after_prompt", True, [257]),
    ],
)
def test_a_bos_is_an_extra_token_and_the_same_tokens_are_scored(bos, adds, head):
    tokenizer = ByteTokenizer(adds)
    data = cut([text("abcdefgh")], tokenizer, 4, bos=bos)
    assert data.ids.tolist() == [[*head, *b"abcd"], [*head, *b"efgh"]]
    assert data.ids[0].tolist() == tokenizer.encode("abcd", bos)
    assert data.ids[data.scored].tolist() == [*b"bcd", *b"fgh"]


def test_the_most_of_one_document():
    data = cut([text("abcdefgh"), text("ijkl")], ByteTokenizer(), 2, most=1)
    assert [bytes(row).decode() for row in data.ids.tolist()] == ["ab", "ij"]


def test_a_completion_is_scored_to_its_end_and_its_prompt_is_not():
    task = Document("1", "1", "2+2=", "4!")
    data = cut([task, Document("2", "2", "a", "b")], ByteTokenizer(), 16)
    assert data.ids.tolist() == [[*b"2+2=4!", 256], [*b"ab", 256, 0, 0, 0, 0]]
    assert data.ids[data.scored].tolist() == [*b"4!", 256, *b"b", 256]
    assert data.lengths.tolist() == [7, 3]


def test_what_is_too_long_for_a_window_is_left_out_and_counted():
    data = cut([Document("1", "1", "x" * 20, "y"), Document("2", "2", "x", "y")], ByteTokenizer(), 8)
    assert (data.document.tolist(), data.left_out) == ([1], 1)
    with pytest.raises(DataError, match="every one of 1 documents is longer than 8 tokens"):
        cut([Document("1", "1", "x" * 20, "y")], ByteTokenizer(), 8)


def test_the_first_token_of_a_window_is_never_scored():
    """Nothing stands before it without a prompt, so that a prompt must not be paid for it either."""
    data = cut([Document("1", "1", "", "yz")], ByteTokenizer(), 8)
    assert data.ids[data.scored].tolist() == [*b"z", 256]


def chat(*contents):
    roles = ("user", "assistant")
    return Document("1", "1", turns=tuple(Turn(roles[i % 2], c) for i, c in enumerate(contents)))


def test_the_assistants_turns_are_scored():
    data = cut([chat("hi", "ho", "he", "ha")], ByteTokenizer(), 99)
    expected = "<user>hi\n<assistant>ho\n<user>he\n<assistant>ha\n"
    assert bytes(data.ids[0].tolist()).decode() == expected
    assert bytes(data.ids[data.scored].tolist()).decode() == "ho\nha\n"


class Thinking(ByteTokenizer):
    """A template that drops what was thought in earlier turns, as reasoning models' do."""

    def chat_text(self, messages, *, asking=True):
        last = len(messages) - 1
        kept = [m["content"] if i == last or m["role"] == "user" else m["content"][-1:] for i, m in enumerate(messages)]
        return super().chat_text([m | {"content": c} for m, c in zip(messages, kept, strict=True)], asking=asking)


def test_a_template_that_rewrites_earlier_turns_gives_a_window_for_each():
    """In one window, the second answer would be learned behind a context that no server ever makes."""
    data = cut([chat("hi", "hmm: x", "he", "ha")], Thinking(), 99)
    assert [bytes([i for i in row if i]).decode() for row in data.ids.tolist()] == [
        "<user>hi\n<assistant>hmm: x\n",
        "<user>hi\n<assistant>x\n<user>he\n<assistant>ha\n",
    ]
    assert data.document.tolist() == [0, 0]
    assert bytes(data.ids[data.scored].tolist()).decode() == "hmm: x\nha\n"


class Shouting(ByteTokenizer):
    def chat_text(self, messages, *, asking=True):
        return super().chat_text(messages, asking=asking).replace("<assistant>", "<A>" if asking else "<B>")


def test_a_template_that_does_not_go_on_from_its_own_question_is_refused():
    with pytest.raises(DataError, match="1: the chat template writes turn 1 otherwise than it asks for it"):
        cut([chat("hi", "ho")], Shouting(), 99)


def test_too_short_says_how_long_the_longest_is():
    with pytest.raises(DataError, match="too short for one window of 512 tokens: the longest of 2 documents has 6"):
        cut([text("abc"), text("abcdef")], ByteTokenizer(), 512)
    with pytest.raises(DataError, match="take at least 2"):
        cut([text("abc")], ByteTokenizer(), 1)


def test_a_bos_that_the_tokenizer_lacks():
    class Bare(ByteTokenizer):
        bos_token_id = None

        def encode(self, text, bos="tokenizer"):
            if bos == "after_prompt":
                raise ValueError("bos is after_prompt, but this model's tokenizer has no BOS token")
            return list(text.encode())

    with pytest.raises(DataError, match="7: bos is after_prompt, but"):
        cut([text("abcd", 7)], Bare(), 2, bos="after_prompt")


def test_the_digest_names_ids_and_scores():
    one, two = (cut([text("abcdefgh")], ByteTokenizer(), n) for n in (4, 2))
    assert one.digest == cut([text("abcdefgh")], ByteTokenizer(), 4).digest != two.digest
    part = one.select(torch.tensor([1]))
    assert part.ids.tolist() == [list(b"efgh")]
    assert part.digest not in (one.digest, two.digest)


def test_the_embedded_models_own_layout(embedded):
    """A chat is what serving encodes, then the answer and the token that ends it; what follows is not scored."""
    tokenizer = HubTokenizer(embedded)
    data = cut([chat("What is 2+2?", "4.", "And 3+3?", "It is 6.")], tokenizer, 512)
    asked = tokenizer.encode_chat([{"role": "user", "content": "What is 2+2?"}])
    ids = data.ids[0].tolist()
    assert ids[: len(asked)] == asked
    (end,) = tokenizer.eos_token_ids
    assert data.ids[data.scored].tolist() == [*tokenizer.encode("4."), end, *tokenizer.encode("It is 6."), end]


def test_the_hub_tokenizer_is_one(tmp_path):
    folder = write_checkpoint(tmp_path / "model", template="{{ messages[0].content }}")
    tokenizer = HubTokenizer(folder)
    assert tokenizer.chat_text([{"role": "user", "content": "x"}], asking=False) == "x"
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer.eos_token_id in tokenizer.eos_token_ids or "eos_token" not in told
    with pytest.raises(ValueError, match="empty conversation"):
        tokenizer.chat_text([])
