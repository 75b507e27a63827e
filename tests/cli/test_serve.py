"""`promptstitch serve` as a process: what it prints, what it seeds, how it ends; and settings that do not hold."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.fake_engine import BASE, HIDDEN, FakeEngine
from support.tiny import rows

from cli.model import EMBEDDED, EMBEDDED_LEVEL, _options, shipped_prompts, start_engine, to_serve
from cli.options import flag
from cli.serve import PANELS, try_it
from llama import identity
from prompts_store.file import PromptFile, read_prompt
from prompts_store.store import PromptStore
from server.settings import Settings, load_settings

SHIPPED_BASE = "sha256:91dfa36327b121cf7e46f2d3c86f9d4846e52d6b9c390b21c1fd4b9fb46c6209"  # smollm2-135m
COMMAND = (sys.executable, "-c", "from cli.main import main; main()")


def test_every_setting_is_an_option_once(cli):
    shown = cli("serve", "--help").stdout
    options = re.findall(r"^│ (--[a-z-]+)", shown, re.MULTILINE)
    assert sorted(options) == sorted([*map(flag, Settings.model_fields.keys() - {"model"}), "--config", "--help"])
    assert sorted(name for names in PANELS.values() for name in names) == sorted(
        Settings.model_fields.keys() - {"model"}
    )
    for name, field in Settings.model_fields.items():
        assert name == "model" or field.description


@pytest.mark.parametrize("words", [(), ("serve",), ("generate",), ("prompts",), ("prompts", "from-text"), ("keys",)])
def test_help_loads_neither_torch_nor_a_web_framework(words):
    """--help took as long as importing torch: seconds."""
    script = (
        "import sys, contextlib\n"
        "from cli.main import app\n"
        f"with contextlib.suppress(SystemExit): app({[*words, '--help']!r})\n"
        "assert not {'torch', 'transformers', 'fastapi', 'sqlalchemy'} & sys.modules.keys(), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--port", "99999"), ["--port (PROMPTSTITCH_PORT)"]),
        (("--port", "x", "--level", "four"), ["--level (PROMPTSTITCH_LEVEL)", "--port (PROMPTSTITCH_PORT)"]),
        (("--max-body", "much"), ["--max-body (PROMPTSTITCH_MAX_BODY)"]),
        (("--config", "missing.toml"), ["--config missing.toml"]),
        (("--seed-prompts", "missing"), ["--seed-prompts (PROMPTSTITCH_SEED_PROMPTS)"]),
    ],
)
def test_bad_settings_end_with_2_and_a_line_each(cli, words, named):
    refused = cli("serve", *words)
    assert refused.exit_code == 2
    lines = refused.stderr.splitlines()
    assert len(lines) == len(named)
    assert all(line.startswith(f"error: {name}") for line, name in zip(lines, named, strict=True))


def test_an_unknown_variable_is_a_bad_setting(cli, monkeypatch):
    monkeypatch.setenv("PROMPTSTITCH_PROT", "1")
    refused = cli("serve")
    assert refused.exit_code == 2
    assert "PROMPTSTITCH_PORT" in refused.stderr


def test_flags_come_before_variables_before_the_file(tmp_path, monkeypatch, cli):
    """Each source in turn names a model that is not there, and the error says which was taken."""
    toml = tmp_path / "settings.toml"
    toml.write_text('model = "from-file"\n')
    given = ("serve", "--config", toml)
    assert "from-file" in cli(*given).stderr
    monkeypatch.setenv("PROMPTSTITCH_MODEL", "from-variable")
    assert "from-variable" in cli(*given).stderr
    assert "from-flag" in cli(*given, "from-flag").stderr


def test_a_model_that_is_not_there_names_pull(cli):
    missing = cli("serve", "org/model")
    assert (missing.exit_code, missing.stderr) == (
        1,
        "error: there is no model org/model, neither as a folder nor pulled: `promptstitch pull org/model`\n",
    )


def test_a_prompt_learned_on_chats_is_tried_with_a_message(tmp_path):
    engine = FakeEngine()
    try:
        for template, field in (("none", "text"), (engine.info.chat_template, "messages")):
            with PromptStore.open(tmp_path / field) as store:
                prompt = rows(2, HIDDEN, 1, base=BASE, chat_template=template)
                store.push(PromptFile(prompt), "haiku", engine.info.level)
                body = json.loads(shlex.split(try_it(engine.info, "http://h", store))[-1])
            assert (body["task"], field in body) == ("haiku", True)
    finally:
        engine.close()


def test_a_server_prints_a_line_that_works_and_ends_with_0(model, tmp_path, base):
    options = ("--store", str(tmp_path / "store"), "--port", "0", "--dtype", "float32", "--kv-memory", "16MiB")
    with subprocess.Popen(
        [*COMMAND, "serve", str(model), "--level", "w8g32", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = []
            while not lines or not lines[-1].startswith("curl"):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            told = "".join(lines)
            assert "tiny at w8g32" in told
            assert "float32 on cpu" in told
            assert base in told
            _, _, url, _, header, _, body = shlex.split(lines[-1])
            name, value = header.split(": ")
            answer = httpx.post(url, content=body, headers={name: value})
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == json.loads(body)["max_tokens"]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--device", "cuda:77"), "cuda:77"), (("--level", "w3g7"), "7"), (("--store", "no://x"), "--blobs")],
)
def test_what_can_be_known_before_loading_is_said_in_one_line(cli, model, options, named):
    refused = cli("serve", model, *options)
    assert refused.exit_code in (1, 2)
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert named in refused.stderr


def test_the_network_is_not_served_without_a_key_and_nothing_is_pulled_for_it(cli, tmp_path):
    refused = cli("serve", "--host", "0.0.0.0", "--store", tmp_path / "store")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: --host: ")
    assert "keys create" in refused.stderr
    assert not (tmp_path / "data").exists()


def test_a_broken_checkpoint_ends_with_1(model, tmp_path, cli):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    refused = cli("serve", folder, "--store", tmp_path / "store")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_only_shipped_prompts_of_the_models_base_are_seeded(model, tmp_path):
    settings, _ = to_serve(load_settings(model=str(model)), lambda *_: None)
    assert (settings.level, settings.seed_prompts) == (None, ())
    own = tmp_path / "own"
    own.write_bytes(shipped_prompts(SHIPPED_BASE)[0].read_bytes())
    chosen, _ = to_serve(load_settings(model=str(model), seed_prompts=[own]), lambda *_: None)
    assert chosen.seed_prompts == (own,)


@pytest.mark.parametrize("level", [None, "w4g32"])
def test_a_checkpoint_without_a_manifest_is_hashed_once(model, level, tmp_path, monkeypatch):
    """Three times it was: to know its base, to check the level, to load it."""
    folder = shutil.copytree(model, tmp_path / "foreign")
    (folder / "promptstitch.json").unlink()
    hashed = []
    digest = identity.weights_digest
    monkeypatch.setattr(identity, "weights_digest", lambda folder: hashed.append(folder) or digest(folder))
    chosen, told = to_serve(load_settings(model=str(folder), level=level, kv_memory="1MiB"), lambda *_: None)
    engine = start_engine(chosen, told, lambda *_: None)
    engine.close()
    assert len(hashed) == 1
    assert (engine.info.weights, engine.info.base) == (told.weights, told.base)


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"store": "/a/store"}, "/a/store/kv"),
        ({"store": "sqlite:////a/store.db", "blobs": "/b/blobs"}, "/b/kv"),
        ({"store": "/a/store", "kv_folder": "/c"}, "/c"),
        ({"store": "/a/store", "kv_folder": "/c", "kv_disk": 0}, None),
    ],
)
def test_where_prefixes_are_kept(given, folder):
    options = _options(load_settings(**given))
    assert options.kept_folder == (folder and Path(folder))
    assert options.kept_bytes == given.get("kv_disk", 1 << 30)


def test_the_shipped_prompt_was_learned_at_the_level_that_is_served_by_default():
    shipped = {file.provenance.level: file for file in map(read_prompt, shipped_prompts(SHIPPED_BASE))}
    assert shipped[EMBEDDED_LEVEL].provenance.task == "general"
    assert shipped[EMBEDDED_LEVEL].provenance.weights is not None
    assert EMBEDDED == "smollm2-135m"
