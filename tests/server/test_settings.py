"""Settings: three sources, one table of defaults, and every fault told at once."""

import pytest

from server.settings import PREFIX, Settings, SettingsError, load_settings


def faults(**flags) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(**flags)
    return caught.value.faults


def test_flag_beats_environment_beats_file_beats_default(monkeypatch, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text('port = 81\nhost = "127.0.0.2"\nmax_queue = 7\n')
    monkeypatch.setenv("PROMPTSTITCH_PORT", "82")
    monkeypatch.setenv("PROMPTSTITCH_HOST", "127.0.0.3")
    settings = load_settings(config, port=83, level=None)
    assert (settings.port, settings.host, settings.max_queue, settings.drain) == (83, "127.0.0.3", 7, 30.0)


ANY_TEXT = {"model", "store", "base", "host", "allowed_hosts", "blobs", "kv_folder"}


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_a_variable(name, monkeypatch):
    """A value that it does not take is refused under its name, so the variable is read."""
    monkeypatch.setenv(PREFIX + name.upper(), "*:*")
    if name in ANY_TEXT:
        assert "*:*" in str(getattr(load_settings(), name))
    else:
        [told] = faults()
        assert told.startswith(f"{name} (PROMPTSTITCH_{name.upper()}): ")


def test_unknown_names_are_refused_everywhere(monkeypatch, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text("max_quue = 7\n")
    monkeypatch.setenv("PROMPTSTITCH_PROT", "82")
    told = sorted(faults(config=config, hots="x"))
    assert told == [
        "PROMPTSTITCH_PROT: no such setting; did you mean PROMPTSTITCH_PORT?",
        "hots: no such setting; did you mean host?",
        "max_quue: no such setting; did you mean max_queue?",
    ]


def test_variables_of_the_tests_and_of_the_command_line_are_left_alone(monkeypatch):
    monkeypatch.setenv("PROMPTSTITCH_FULL", "1")
    monkeypatch.setenv("PROMPTSTITCH_URL", "http://localhost:1")
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"port": 65536}, "port (PROMPTSTITCH_PORT): Input should be less than or equal to 65535"),
        ({"dtype": "int3"}, "dtype (PROMPTSTITCH_DTYPE): Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"device": "tpu"}, "device (PROMPTSTITCH_DEVICE): String should match"),
        ({"level": "W4G128"}, "level (PROMPTSTITCH_LEVEL): level 'W4G128' is written 'w4g128'"),
        ({"drain": float("nan")}, "drain (PROMPTSTITCH_DRAIN): Input should be"),
        ({"kv_memory": "much"}, "kv_memory (PROMPTSTITCH_KV_MEMORY): could not"),
        ({"seed_prompts": ["missing.safetensors"]}, "no such file: missing.safetensors"),
        ({"resolution": "guess"}, "resolution (PROMPTSTITCH_RESOLUTION): Input should be 'exact', 'transfer'"),
        ({"served_model_name": "a b"}, "served_model_name (PROMPTSTITCH_SERVED_MODEL_NAME): String should match"),
    ],
)
def test_a_bad_value_is_told_with_its_name(flags, told):
    assert told in "\n".join(faults(**flags))


def test_all_faults_at_once():
    assert len(faults(port=-1, dtype="x", max_queue=0, level="nope")) == 4


def test_files_that_are_missing_or_no_toml(tmp_path):
    config = tmp_path / "serve.toml"
    assert faults(config=config) == [f"--config {config}: no such file"]
    config.write_text("port = = 1")
    assert "serve.toml: Invalid value" in faults(config=config)[0]


def test_sizes_and_lists_are_understood(monkeypatch, tmp_path):
    seed = tmp_path / "a.safetensors"
    seed.touch()
    monkeypatch.setenv("PROMPTSTITCH_SEED_PROMPTS", f"{seed}, {seed}")
    monkeypatch.setenv("PROMPTSTITCH_KV_MEMORY", "2GiB")
    settings = load_settings(allowed_hosts=["a.example"])
    assert (settings.seed_prompts, settings.kv_memory, settings.allowed_hosts) == (
        (seed, seed),
        2 << 30,
        ("a.example",),
    )


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


def test_variables_of_a_kubernetes_service_of_our_name_are_no_settings(monkeypatch):
    for name, value in {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "PORT": "tcp://10.0.0.1:8000",
        "PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PORT_8000_TCP_PROTO": "tcp",
    }.items():
        monkeypatch.setenv(f"PROMPTSTITCH_{name}", value)
    assert load_settings().port == 8000
    monkeypatch.setenv("PROMPTSTITCH_PORT", "9000")
    assert load_settings().port == 9000
