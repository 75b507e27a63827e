"""The golden self-test as it is written in a file."""

import json

import pytest

from prompts_store.errors import InvalidArtifact
from prompts_store.file import PromptFile, Provenance, encode_prompt, read_prompt
from prompts_store.golden import Golden

GOLDEN = Golden((1, 2, 49151), 3.125)


def test_it_travels_with_the_file(rows):
    file = PromptFile(rows(1), Provenance("general", "w3g64", golden=GOLDEN))
    again = read_prompt(encode_prompt(file))
    assert again.provenance.golden == GOLDEN
    assert encode_prompt(again) == encode_prompt(file)
    assert again.prompt.digest == rows(1).digest  # the test is no part of the identity


def test_one_value_has_one_text():
    assert GOLDEN.text() == '{"ids":[1,2,49151],"loss":3.125}'
    assert Golden.parse('{"loss": 3, "ids": [1, 2]}') == Golden((1, 2), 3.0)
    assert Golden.parse(GOLDEN.text()) == GOLDEN


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"ids":[1,2]}',
        '{"ids":[1,2],"loss":1,"x":1}',
        '{"ids":"ab","loss":1}',
        '{"ids":[1],"loss":1}',
        json.dumps({"ids": [1] * 257, "loss": 1}),
        '{"ids":[1,-1],"loss":1}',
        '{"ids":[1,true],"loss":1}',
        '{"ids":[1,2.0],"loss":1}',
        '{"ids":[1,2147483648],"loss":1}',
        '{"ids":[1,2],"loss":true}',
        '{"ids":[1,2],"loss":"1"}',
        '{"ids":[1,2],"loss":-0.1}',
        '{"ids":[1,2],"loss":1001}',
        '{"ids":[1,2],"loss":1,"loss":1}',
    ],
)
def test_what_is_no_golden_test_is_refused_by_name(text):
    with pytest.raises(InvalidArtifact) as refused:
        Golden.parse(text)
    assert refused.value.field == "golden"
