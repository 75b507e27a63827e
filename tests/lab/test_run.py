"""Run folders: whole at any moment, taken up only by the same config, never by two at once."""

import errno
import io
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lab.disk import write_bytes
from lab.errors import RunError
from lab.progress import Lines, progress
from lab.run import LOG, STATE, State, config_digest, open_run

CONFIG = {"recipe": {"lr": 0.01, "steps": 5}, "data": "sha256:00"}


def test_a_folder_keeps_config_versions_log_state_and_figures(tmp_path):
    with open_run(tmp_path / "run", CONFIG, seed=3) as run:
        assert run.load() is None
        run.log("step", loss=1.5)
        run.save(State({"rows": torch.ones(2, 3)}, {"step": 1}))
        run.tell(loss=1.5)
        run.tell(tokens=10)
    with open_run(tmp_path / "run", CONFIG, seed=3) as run:
        state = run.load()
        assert state is not None
        assert torch.equal(state.tensors["rows"], torch.ones(2, 3))
        assert state.values == {"step": 1}
        assert run.figures == {"loss": 1.5, "tokens": 10}
        assert [line["loss"] for line in run.events("step")] == [1.5]
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["digest"] == config_digest({"config": CONFIG, "seed": 3})
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["torch"] == torch.__version__


def test_another_config_is_refused_by_the_name_of_the_field(tmp_path):
    open_run(tmp_path, CONFIG).close()
    with pytest.raises(RunError, match=r"recipe\.lr was 0\.01, now 0\.02\. Ask for the same, or choose another --run"):
        open_run(tmp_path, {**CONFIG, "recipe": {"lr": 0.02, "steps": 5}})
    with pytest.raises(RunError, match="seed was 0, now 1"):
        open_run(tmp_path, CONFIG, seed=1)
    open_run(tmp_path, CONFIG).close()  # the refusals let go of the folder


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds no run"):
        open_run(tmp_path, CONFIG)


def test_one_process_at_a_time(tmp_path):
    with open_run(tmp_path, CONFIG), pytest.raises(RunError, match="another process"):
        open_run(tmp_path, CONFIG)


def test_the_log_goes_on_from_the_state_and_a_torn_line_is_dropped(tmp_path):
    with open_run(tmp_path, CONFIG) as run:
        run.log("step", number=1)
        run.save(State({"x": torch.zeros(1)}, {}))
        run.log("step", number=2)
    with (tmp_path / LOG).open("ab") as log:
        log.write(b'{"event": "st')
    with open_run(tmp_path, CONFIG) as run:
        assert [line["number"] for line in run.events()] == [1, 2]
        run.load()
        run.log("step", number=3)
        assert [line["number"] for line in run.events()] == [1, 3]


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    with open_run(tmp_path, CONFIG) as run:
        run.save(State({"x": torch.zeros(1)}, {"step": 1}))

        def full(*args):
            Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("lab.run.save_file", full)
            with pytest.raises(RunError, match=r"No space left on device.*make room"):
                run.save(State({"x": torch.ones(1)}, {"step": 2}))
        state = run.load()
        assert state is not None
        assert state.values == {"step": 1}
        assert not list(tmp_path.glob(".*part"))


def test_a_real_full_disk_is_told_when_writing_bytes(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        write_bytes(Path("/dev/full/x"), b"x")


def test_a_line_that_a_full_disk_refuses_is_told_once_and_the_folder_let_go(tmp_path):
    """Closing tried to write the line again, and that error took the place of the one that says what to do."""
    with open_run(tmp_path, CONFIG) as run:
        run._log.close()
        run._log = Path("/dev/full").open("ab")  # noqa: SIM115
        with pytest.raises(RunError, match=r"No space left on device.*make room"):
            run.log("step")
    open_run(tmp_path, CONFIG).close()


def test_a_damaged_state_says_what_to_do(tmp_path):
    with open_run(tmp_path, CONFIG) as run:
        (tmp_path / STATE).write_bytes(b"nonsense")
        with pytest.raises(RunError, match="remove it to start the run again"):
            run.load()


KILLED = """
    import sys
    from pathlib import Path
    import torch
    from lab.run import State, open_run
    with open_run(Path(sys.argv[1]), {"x": 1}) as run:
        state = run.load()
        step = state.values["step"] if state else 0
        while True:
            step += 1
            run.log("step", step=step)
            run.save(State({"x": torch.full((1000,), float(step))}, {"step": step}))
            print("saved", flush=True)
            run.tell(step=step)
"""


def test_killed_while_saving_again_and_again_every_state_is_whole(tmp_path):
    last = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "run")], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with open_run(tmp_path / "run", {"x": 1}) as run:
            state = run.load()
            assert state is not None
            step = state.values["step"]
            assert torch.equal(state.tensors["x"], torch.full((1000,), float(step)))
            assert [line["step"] for line in run.events("step")] == list(range(1, step + 1))
            assert step > last
            last = step


def test_where_no_terminal_is_progress_is_told_in_lines():
    out, now = io.StringIO(), [0.0]
    lines = Lines(out, lambda: now[0])
    for done in range(5):
        lines("learn, loss 3.1", done, 4)
        now[0] += 20
    assert [line.split(",")[1].split(": ")[1] for line in out.getvalue().splitlines()] == [
        "0 of 4 (0%)",
        "2 of 4 (50%)",
        "4 of 4 (100%)",
    ]
    assert "ends about" in out.getvalue()


def test_quiet_progress_writes_nothing():
    out = io.StringIO()
    with progress(quiet=True, stream=out) as report:
        report("learn", 1, 2)
    with progress(stream=out) as report:
        assert isinstance(report, Lines)
    assert out.getvalue() == ""


def test_the_command_line_that_first_asked_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/promptstitch", "learn", "a model", "--steps", "3"])
    open_run(tmp_path, {"a": 1}).close()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/promptstitch", "matrix"])
    open_run(tmp_path, {"a": 1}).close()
    assert (tmp_path / "command.txt").read_text() == "promptstitch learn 'a model' --steps 3\n"
