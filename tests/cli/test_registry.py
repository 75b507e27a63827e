"""Prompts and keys on a local store and through a server: the same commands, the same answers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import httpx
import pytest
from support.fake_engine import LEVEL, WEIGHTS
from support.served import prompt_file, serving

from prompts_store.file import PromptFile, Provenance, encode_prompt, read_prompt
from prompts_store.records import Measurement
from prompts_store.store import PromptStore


def test_a_prompt_goes_in_and_comes_out_bit_for_bit(answer, place, prompt, tmp_path):
    source = prompt(1)
    pushed = answer("prompts", "push", source, "--task", "haiku", *place)
    assert (pushed["task"], pushed["version"], pushed["level"], pushed["new"]) == ("haiku", 1, "w4g128", True)
    assert answer("prompts", "push", source, "--task", "haiku", *place)["new"] is False

    target = tmp_path / "out.safetensors"
    told = answer("prompts", "pull", "haiku", "--to", target, *place)
    assert told["digest"] == read_prompt(target).prompt.digest == read_prompt(source).prompt.digest


def test_pull_replaces_a_file_only_by_force(answer, cli, place, prompt, tmp_path):
    answer("prompts", "push", prompt(1), "--task", "haiku", *place)
    target = tmp_path / "mine"
    target.write_text("precious")
    refused = cli("prompts", "pull", "haiku@1", "--to", target, *place)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert target.read_text() == "precious"
    answer("prompts", "pull", "haiku@1", "--to", target, "--force", *place)
    assert read_prompt(target).prompt.num_virtual_tokens == 4


def test_pull_on_a_full_disk_leaves_the_file_that_was_there(answer, cli, place, prompt, tmp_path, monkeypatch):
    answer("prompts", "push", prompt(1), "--task", "haiku", *place)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "mine"
    target.write_text("precious")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    refused = cli("prompts", "pull", "haiku@1", "--to", target, "--force", *place)
    assert refused.exit_code == 1
    assert refused.stderr == f"error: {target}: No space left on device\n"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    assert target.read_text() == "precious"


def test_the_task_may_stand_in_the_file(answer, cli, place, prompt, tmp_path):
    named = tmp_path / "named.safetensors"
    file = prompt_file(1)
    named.write_bytes(encode_prompt(PromptFile(file.prompt, Provenance("limerick", "w4g128"))))
    assert answer("prompts", "push", named, *place)["task"] == "limerick"
    refused = cli("prompts", "push", prompt(2), *place)
    assert refused.exit_code == 2
    assert "--task" in refused.stderr


def test_a_level_is_asked_for_where_the_file_has_none(answer, cli, place, prompt):
    source = prompt(1, level=None, weights=None)
    refused = cli("prompts", "push", source, "--task", "haiku", *place)
    assert refused.exit_code == 2
    assert "level" in refused.stderr
    assert answer("prompts", "push", source, "--task", "haiku", "--level", "w3g64", *place)["level"] == "w3g64"


def test_list_and_show_say_what_is_there(answer, cli, place, prompt):
    assert cli("prompts", "list", *place).stdout.startswith("no prompts")
    for seed in (1, 2):
        answer("prompts", "push", prompt(seed), "--task", "haiku", *place)
    answer("prompts", "alias", "haiku@1", "best", *place)

    (task,) = answer("prompts", "list", *place)["data"]
    assert (task["task"], task["versions"], task["latest"], task["levels"]) == ("haiku", 2, 2, ["w4g128"])
    versions = answer("prompts", "list", "haiku", *place)["data"]
    assert [(v["version"], v["aliases"]) for v in versions] == [(1, ["best"]), (2, [])]
    assert answer("prompts", "list", "haiku", "--level", "w3g64", *place)["data"] == []

    for ref, number in (("haiku", 2), ("haiku@1", 1), ("haiku:best", 1), (f"haiku@{versions[1]['digest']}", 2)):
        assert answer("prompts", "show", ref, *place)["version"] == number
    shown = cli("prompts", "show", "haiku:best", *place).stdout
    assert versions[0]["digest"] in shown


def test_the_default_alias_is_what_a_bare_task_means(answer, place, prompt):
    for seed in (1, 2):
        answer("prompts", "push", prompt(seed), "--task", "haiku", *place)
    answer("prompts", "alias", "haiku@1", "default", *place)
    assert answer("prompts", "show", "haiku", *place)["version"] == 1


def test_an_alias_moves_and_goes(answer, cli, place, prompt):
    for seed in (1, 2):
        answer("prompts", "push", prompt(seed), "--task", "haiku", *place)
    assert answer("prompts", "alias", "haiku@1", "best", *place)["new"] is True
    moved = answer("prompts", "alias", "haiku@2", "best", *place)
    assert (moved["version"], moved["new"]) == (2, False)
    assert answer("prompts", "alias", "haiku@2", "best", *place)["version"] == 2
    assert answer("prompts", "rm", "haiku:best", *place)["deleted"] is True
    gone = cli("prompts", "rm", "haiku:best", *place)
    assert gone.exit_code == 1
    assert "prompts list haiku" in gone.stderr


def test_rm_takes_one_version_and_never_an_aliased_one_or_a_whole_task(answer, cli, place, prompt):
    for seed in (1, 2):
        answer("prompts", "push", prompt(seed), "--task", "haiku", *place)
    answer("prompts", "alias", "haiku@1", "best", *place)
    assert cli("prompts", "rm", "haiku", *place).exit_code == 2
    aliased = cli("prompts", "rm", "haiku@1", *place)
    assert aliased.exit_code == 1
    assert "best" in aliased.stderr
    assert answer("prompts", "rm", "haiku@2", *place)["version"] == 2
    assert [v["version"] for v in answer("prompts", "list", "haiku", *place)["data"]] == [1]


@pytest.mark.parametrize("ref", ["haiku@9", "haiku:none", "haiku@sha256:" + "0" * 64])
def test_what_is_not_there_is_answered_with_what_is(answer, cli, place, prompt, ref):
    answer("prompts", "push", prompt(1), "--task", "haiku", *place)
    missing = cli("prompts", "show", ref, *place)
    assert missing.exit_code == 1
    assert missing.stderr == f"error: there is no {ref}; versions: @1; aliases: none\n"


def test_an_unknown_task_and_a_bad_reference_are_told_apart(cli, place):
    unknown = cli("prompts", "show", "nothing", *place)
    assert (unknown.exit_code, unknown.stderr.count("\n")) == (1, 1)
    bad = cli("prompts", "show", "Not A Task", *place)
    assert (bad.exit_code, bad.stderr.count("\n")) == (2, 1)


def test_a_file_that_is_no_prompt_is_refused(cli, place, tmp_path):
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x00" * 100)
    refused = cli("prompts", "push", junk, "--task", "haiku", *place)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_keys_of_a_local_store_close_its_server(answer, tmp_path):
    made = answer("keys", "create", "ops", "--scope", "admin", "--store", tmp_path / "store")
    assert made["secret"].startswith("ps_")
    with serving(tmp_path / "store", wait=False) as served:
        assert httpx.get(f"{served.url}/v1/prompts").status_code == 401
        listed = answer("keys", "list", "--url", served.url, "--key", made["secret"])["data"]
        assert [(key["name"], key["scopes"]) for key in listed] == [("ops", ["admin"])]
        assert "secret" not in listed[0]
        other = answer("keys", "create", "app", "--url", served.url, env={"PROMPTSTITCH_API_KEY": made["secret"]})
        assert other["scopes"] == ["infer"]
        gone = answer("keys", "revoke", other["id"], "--url", served.url, "--key", made["secret"])
        assert gone == {"id": other["id"], "revoked": True}


def test_a_missing_key_names_the_option(cli, tmp_path):
    def admin(store: PromptStore) -> None:
        store.keys.create("ops", ["admin"])

    with serving(tmp_path / "store", prepare=admin) as served:
        refused = cli("prompts", "list", "--url", served.url)
    assert refused.exit_code == 1
    assert "--key" in refused.stderr


def test_unknown_scopes_are_named(cli, tmp_path):
    refused = cli("keys", "create", "ops", "--scope", "root", "--store", tmp_path / "store")
    assert refused.exit_code == 2
    assert "prompts:read" in refused.stderr


def test_a_store_that_a_server_holds_names_url(cli, tmp_path):
    with serving(tmp_path / "store"):
        locked = cli("prompts", "list", "--store", tmp_path / "store")
    assert locked.exit_code == 1
    assert "--url" in locked.stderr


def test_where_nothing_listens_the_message_names_url(cli, unused_tcp_port):
    refused = cli("prompts", "list", "--url", f"http://127.0.0.1:{unused_tcp_port}")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "--url" in refused.stderr


def test_store_and_url_together_are_a_usage_error(cli, tmp_path):
    both = cli("prompts", "list", "--store", tmp_path, "--url", "http://127.0.0.1:1")
    assert both.exit_code == 2


def test_what_was_measured_is_listed(answer, cli, prompt, tmp_path):
    with serving(tmp_path / "store") as served:
        place = ("--url", served.url)
        answer("prompts", "push", prompt(1), "--task", "haiku", *place)
        assert cli("prompts", "measurements", "haiku", *place).stdout == "haiku@1 was never measured\n"
        gain = {"gain": 0.25, "gain_low": 0.125, "gain_high": 0.5}
        measured = Measurement("perplexity", 9.5, "sha256:" + "cd" * 32, "report", LEVEL, WEIGHTS, 1000, *gain.values())
        served.store.measurements.add("haiku", 1, measured)
        (listed,) = answer("prompts", "measurements", "haiku@1", *place)["data"]
        assert {name: listed[name] for name in gain} == gain
        assert "0.125" in cli("prompts", "measurements", "haiku", *place).stdout
    (local,) = answer("prompts", "measurements", "haiku", "--store", tmp_path / "store")["data"]
    assert local == listed


def test_an_alias_may_require_a_gain_of_what_a_server_serves(answer, cli, prompt, tmp_path):
    with serving(tmp_path / "store") as served:
        place = ("--require-gain", "--url", served.url)
        for seed in (1, 2):
            answer("prompts", "push", prompt(seed), "--task", "haiku", *place[1:])
        refused = cli("prompts", "alias", "haiku@1", "best", *place)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert "promptstitch evaluate" in refused.stderr
        for version in (1, 2):
            served.store.measurements.add(
                "haiku",
                version,
                Measurement("kl", 0.5, "sha256:" + "cd" * 32, "report", LEVEL, WEIGHTS, 1000, 0.25, 0.125, 0.5),
            )
            assert answer("prompts", "alias", f"haiku@{version}", "best", *place)["version"] == version
    refused = cli("prompts", "alias", "haiku@1", "best", "--require-gain", "--store", tmp_path / "store")
    assert refused.exit_code == 2
    assert "--url" in refused.stderr


def test_an_alias_of_another_base_goes_and_no_other(answer, prompt, tmp_path):
    """A server took away the alias of the base that it serves, and the answer told of the other one."""
    other = "sha256:" + "e" * 64

    def two_bases(store: PromptStore) -> None:
        for base in ({}, {"base": other}):
            version, _ = store.push(prompt_file(1, **base), "haiku")
            store.aliases.put("haiku", "best", version.version)

    with serving(tmp_path / "store", prepare=two_bases) as served:
        told = answer("prompts", "rm", "haiku:best", "--base", other, "--url", served.url)
        assert (told["base"], told["deleted"]) == (other, True)
        assert [alias.base == other for alias in served.store.aliases.list("haiku").items] == [False]


def test_a_key_of_other_letters_is_a_usage_error(cli):
    refused = cli("prompts", "list", "--url", "http://127.0.0.1:1", "--key", "k\u00e9y")
    assert refused.exit_code == 2
    assert "--key" in refused.stderr
