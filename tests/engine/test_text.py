"""Text leaves the engine in whole characters and without stop strings."""

import pytest

from engine.text import TextStream


def stream(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text = TextStream(lambda i: pieces[i], stops)
    return [text.push(i) for i in range(len(pieces))], text


def test_half_a_character_is_held_back():
    euro = "€".encode()
    shown, text = stream([b"a" + euro[:1], euro[1:2], euro[2:] + b"b"])
    assert shown == ["a", "", "€b"]
    assert text.finish() == ""


def test_a_character_that_never_ends_becomes_a_replacement():
    shown, text = stream([b"a\xe2\x82"])
    assert shown == ["a"]
    assert text.finish() == "�"


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "stopped"),
    [
        (["Hello", " wor", "ld"], ("wo",), "Hello ", "wo"),
        (["ab", "ab", "c"], ("abc",), "ab", "abc"),
        (["x", "END"], ("END", "EN"), "x", "END"),  # of two that begin together, the longer
        (["one two"], ("two", "one"), "", "one"),  # the earlier of two
        (["aa", "ab"], ("ac",), "aaab", None),
        (["a", "a", "b"], ("aab",), "", "aab"),
    ],
)
def test_stop_strings(pieces, stops, shown, stopped):
    text = TextStream(lambda i: pieces[i].encode(), stops)
    out = ""
    for i in range(len(pieces)):
        out += text.push(i)
        if text.stopped is not None:
            break
    assert out + text.finish() == shown
    assert text.stopped == stopped


def test_what_may_become_a_stop_string_waits_until_it_cannot():
    shown, text = stream([b"ok S", b"T", b"A", b"Y"], ("STOP",))
    assert shown == ["ok ", "", "STA", "Y"]
    assert text.stopped is None


def test_stop_strings_pass_before_min_tokens():
    text = TextStream(lambda _: b"STOP", ("STOP",))
    assert text.push(0, match=False) == "STOP"
    assert text.push(0) == ""
    assert text.stopped == "STOP"
