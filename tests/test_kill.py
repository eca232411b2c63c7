"""The short form of `benchmarks/kill_test.py`: five SIGKILLs, and the end is that of a run that was never killed."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_test.py"


@pytest.mark.slow  # a run, six attempts at it, and an import of torch and lightning
@pytest.mark.parametrize("options", [[], ["--ranks", "2", "--kills", "2"]], ids=["one process", "two ranks"])
def test_a_killed_run_ends_bit_identical(options: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--seed", "3", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert re.search(r"the end states are bit-identical", run.stdout)


SIGNALLED = """
import os, signal, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import kill_test
torch.set_num_threads(1)
folder = Path(sys.argv[2])
reader, writer = os.pipe()
settings = kill_test.Settings(400, ranks=2)
pids = [kill_test.fork(folder, settings, None, rank, int(sys.argv[3]), writer) for rank in range(2)]
started = [os.read(reader, 1) for _ in pids]
os.kill(pids[1], signal.SIGTERM)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
"""


@pytest.mark.slow  # imports torch and lightning, and starts two ranks
def test_a_signal_to_one_rank_ends_all_with_one_checkpoint(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SIGNALLED, str(SCRIPT.parent), str(tmp_path), str(port)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.stdout.splitlines()[-1] == "[143, 143]", (
        run.stdout + run.stderr + (tmp_path / "output.txt").read_text()[-3000:]
    )
    assert (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").is_file()
