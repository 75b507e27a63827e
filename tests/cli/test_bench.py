"""A load put on a server that serves the checkpoint whose tokenizer measures the texts."""

from __future__ import annotations

from support.served import serving

LOAD = ("--requests", 2, "--concurrency", 1, "--max-tokens", 2, "--shortest", 4, "--longest", 8)


def test_the_bare_model_is_asked_for_as_serve_names_it(answer, model, tmp_path):
    """The checkpoint's path was sent as its name, and every request failed."""
    with serving(tmp_path / "store") as served:
        told = answer("bench", model, "--url", served.url, *LOAD)
    assert (told["requests"], told["errors"]) == (2, {})
