"""The process of the command line: exit codes of signals at any moment, and output that nobody reads."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import CSV_LOGGER, overlay

PROLOGUE = """
import os, signal, sys, threading, time
from stateset_lightning.cli import program
program._LEAVE_SECONDS = 0.2
program.begin()
def send(number):
    os.kill(os.getpid(), number)
"""


def as_from_a_terminal():
    """The tests may have been started by nohup, and what it ignores is inherited."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ended(code, **options):
    command = [sys.executable, "-c", PROLOGUE + code]
    options = {"capture_output": True, "preexec_fn": as_from_a_terminal, **options}
    return subprocess.run(command, timeout=30, text=True, **options)


@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(60)",
        "try: time.sleep(60)\nexcept BaseException: time.sleep(60)",
        "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
        "import atexit; atexit.register(time.sleep, 60); time.sleep(60)",
    ],
    ids=["waits", "swallows", "non-daemon thread", "hangs at exit"],
)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_program_soon_with_its_code_and_without_a_traceback(sent, wait):
    done = ended(f"threading.Timer(0.1, send, [{int(sent)}]).start()\n{wait}")  # in half a minute, start-up included
    assert (done.returncode, done.stdout, done.stderr) == (128 + sent, "", "")


def test_a_hangup_that_is_ignored_at_the_start_stays_ignored():
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = ended("send(signal.SIGHUP); print('goes on')", preexec_fn=nohup)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def closed():
    os.close(1)


def test_output_that_nobody_reads_any_more_is_dropped_and_the_program_goes_on(tmp_path):
    code = f"for n in range(9): print(n, flush=True)\nopen({str(tmp_path / 'end')!r}, 'w').write('reached')"
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, os.fdopen(writer, "w") as broken:
        for options, said in [
            ({"stdout": broken}, "descriptor 1 is gone (Broken pipe): its output is dropped\n"),
            ({"stdout": full}, "descriptor 1 is gone (No space left on device): its output is dropped\n"),
            ({"stdout": None, "preexec_fn": closed}, ""),
        ]:
            done = ended(code, capture_output=False, stderr=subprocess.PIPE, **options)
            assert (done.returncode, done.stderr) == (0, said)
            assert (tmp_path / "end").read_text() == "reached"
            (tmp_path / "end").unlink()


HANGS = """
import pathlib, time
from stateset_lightning import RewardFunction
class Hangs(RewardFunction):
    def compute_reward(self, turns, context=None):
        pathlib.Path("hangs").touch()
        time.sleep(100)
"""


@pytest.mark.slow  # each imports torch and lightning in a process of its own
@pytest.mark.parametrize("command", ["fit", "validate", "predict", "doctor"])
def test_a_signal_while_a_reward_hangs_ends_every_command_within_ten_seconds(config, command):
    Path("hanging.py").write_text(HANGS)
    reward = {"model": {"reward": [{"class_path": "hanging.Hangs"}]}, "trainer": {"logger": CSV_LOGGER}}
    rows = {"data": {"validation": "rows.jsonl", "predict": "rows.jsonl"}}
    words = [command, "--config", config, "--config", overlay("hangs.yaml", {**reward, **rows})]
    with subprocess.Popen([sys.executable, "-m", "stateset_lightning", *words], stderr=subprocess.PIPE) as run:
        while not Path("hangs").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        assert run.wait(10) == 143
    assert Path("runs/cli/version_0/checkpoints/last.ckpt").exists() == (command == "fit")
