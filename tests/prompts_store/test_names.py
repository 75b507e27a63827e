"""The grammar of references, and the canonical names of levels."""

import pytest

from prompts_store.errors import BadLevel, BadReference
from prompts_store.level import bits_per_weight, parse_level
from prompts_store.reference import Reference, check_alias, parse_reference

DIGEST = "sha256:" + "0f" * 32


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("general", Reference("general")),
        ("a.b-c_d.0", Reference("a.b-c_d.0")),
        ("general@3", Reference("general", version=3)),
        ("general@999999999", Reference("general", version=999999999)),
        ("general:default", Reference("general", alias="default")),
        ("general:V1.2-rc_", Reference("general", alias="V1.2-rc_")),
        (f"general@{DIGEST}", Reference("general", digest=DIGEST)),
        ("a" * 128, Reference("a" * 128)),
    ],
)
def test_references_are_read_and_written(text, reference):
    assert parse_reference(text) == reference
    assert str(reference) == text
    assert reference.explicit == ("@" in text)


@pytest.mark.parametrize(
    "text",
    [
        "", "@3", ":x", "General", "a--b", "a..b", "-a", "a-", "a b", "a/b", "../a", "a\0b", "a\n", "ä", "a" * 129,
        "a@", "a@0", "a@01", "a@-1", "a@1000000000", "a@1.0", "a@sha256:0f", f"a@{DIGEST.upper()}", f"a@{DIGEST}0",
        f"a@{DIGEST}\n", "a@3@4", "a:", "a:-x", "a:.x", "a:b:c", "a:b@3", "a:x/y", "a:" + "x" * 129, "a@٣",
        "%2e%2e", "con\\nul", "a:b\n",
    ],
)  # fmt: skip
def test_what_is_no_reference(text):
    with pytest.raises(BadReference):
        parse_reference(text)


def test_a_name_that_nests_is_refused_in_linear_time():
    with pytest.raises(BadReference):
        parse_reference("a-" * 60 + "!")
    with pytest.raises(BadReference):
        check_alias("x" * 1_000_000)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("dense", 16.0), ("int8", 8.0), ("nf4", 4.5), ("w4g128", 4.125), ("w3g64", 3.25), ("w2g16", 3.0), ("w8", 8.0),
        ("s50", 8.0), ("s2of4", 8.0), ("s90", 1.6), ("w4g128-s50", 2.0625), ("w4g128-s2of4", 2.0625), ("nf4-s50", 2.25),
        ("int8-s25", 6.0), ("w4-s1", 3.96), ("s4of8", 8.0), ("w3-s4of8", 1.5), ("s1of4", 4.0),
    ],
)  # fmt: skip
def test_canonical_levels_and_their_bits(name, bits):
    assert str(parse_level(name)) == name
    assert bits_per_weight(name) == pytest.approx(bits, rel=1e-12)


def test_two_of_four_is_another_level_than_half():
    assert parse_level("s2of4") != parse_level("s50")


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("W4G128", "w4g128"), ("s50-w4g128", "w4g128-s50"), ("w4g0128", "w4g128"), ("w4g128_s50", "w4g128-s50"),
        ("fp16", "dense"), ("bf16", "dense"), ("dense-w4g128", "w4g128"), ("s0", "dense"), ("w4g128-s0", "w4g128"),
        ("w4g128-2:4", "w4g128-s2of4"), ("LLM.int8", "int8"), ("s05", "s5"), ("NF4+S50", "nf4-s50"),
    ],
)  # fmt: skip
def test_other_spellings_are_refused_with_the_canonical_one(name, canonical):
    with pytest.raises(BadLevel) as refused:
        parse_level(name)
    assert refused.value.canonical == canonical
    assert repr(canonical) in refused.value.message


@pytest.mark.parametrize(
    "name",
    ["", "-", "q4", "w9g128", "w1", "w4g0", "w4g", "s100", "s-1", "s50-s60", "nf4-int8", "w4g128-", "w4 g128", "w" * 99,
     "s4of4", "s3of6", "s50\n", "w4g128-s50-x", "s٥٠"],
)  # fmt: skip
def test_what_is_no_level(name):
    with pytest.raises(BadLevel) as refused:
        parse_level(name)
    assert refused.value.canonical is None
