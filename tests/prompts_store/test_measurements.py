"""Measurements: what their numbers may be, and what a gain is good for."""

import pytest

from prompts_store.errors import BadLevel, BadMeasurement, Conflict, NotFound
from prompts_store.file import PromptFile
from prompts_store.records import Measurement

W = "sha256:" + "77" * 32
OTHER_W = "sha256:" + "88" * 32
DATA = "sha256:" + "dd" * 32


@pytest.mark.parametrize(
    ("field", "value"),
    [("metric", "Perplexity!"), ("metric", ""), ("split", "x" * 65), ("value", float("nan")), ("value", float("inf")),
     ("dataset", "c4"), ("served_weights", "w"), ("scored_tokens", 0), ("scored_tokens", 2**60),
     ("served_level", "fp16")],
)  # fmt: skip
def test_measurements_are_bounded(store, rows, field, value):
    store.push(PromptFile(rows(1)), "general", "s50")
    good = {"metric": "perplexity", "value": 1.0, "dataset": DATA, "split": "select", "served_level": "s50"}
    with pytest.raises((BadMeasurement, BadLevel)) as refused:
        store.measurements.add("general", 1, Measurement(**{**good, field: value}))
    assert refused.value.field == ("level" if field == "served_level" else field)
    with pytest.raises(NotFound):
        store.measurements.add("general", 2, Measurement(**good))


@pytest.mark.parametrize(
    ("gain", "field"),
    [((0.1, None, None), "gain_low"), ((None, 0.1, 0.2), "gain"), ((0.1, 0.0, None), "gain_high"),
     ((0.3, 0.1, 0.2), "gain"), ((0.1, 0.2, 0.3), "gain"), ((0.1, 0.2, 0.0), "gain"),
     ((float("nan"), 0.0, 1.0), "gain"), ((0.0, float("-inf"), 1.0), "gain_low"), ((0.0, 0.0, 1001.0), "gain_high")],
)  # fmt: skip
def test_a_gain_has_an_interval_that_holds_it(store, rows, gain, field):
    store.push(PromptFile(rows(1)), "general", "s50")
    with pytest.raises(BadMeasurement) as refused:
        store.measurements.add("general", 1, Measurement("perplexity", 1.0, DATA, "report", "s50", W, 9, *gain))
    assert refused.value.field == field


def test_an_alias_may_ask_for_a_gain_on_the_weights_that_are_served(store, rows):
    store.push(PromptFile(rows(1)), "general", "s50")

    def measure(low, high, weights=W, split="report"):
        gain = ((low + high) / 2, low, high)
        store.measurements.add("general", 1, Measurement("perplexity", 9.0, DATA, split, "s50", weights, 9000, *gain))

    def refused():
        with pytest.raises(Conflict, match="evaluate") as conflict:
            store.aliases.put("general", "best", 1, gain_on=W)
        assert conflict.value.code == "gain_not_shown"

    refused()  # nothing measured
    measure(0.1, 0.3, OTHER_W)
    refused()  # on other weights
    measure(0.0, 0.3)
    refused()  # the interval touches 0
    measure(0.1, 0.3)
    assert store.aliases.put("general", "best", 1, gain_on=W)[1]
    measure(-0.2, 0.1)
    refused()  # a later one of the same kind counts, though the alias stands there already
    measure(0.1, 0.3, split="select")
    assert not store.aliases.put("general", "best", 1, gain_on=W)[1]
    [*_, last] = store.measurements.list("general", 1).items
    assert (last.measurement.gain, last.measurement.gain_low, last.measurement.gain_high) == (0.2, 0.1, 0.3)
