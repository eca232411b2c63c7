"""Worker processes and training scripts: functions that are defined in `__main__`, missing guards, orphans."""

import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys
from stateset_lightning.rewards import RewardFunction, Scorer
from stateset_lightning.types import Turn

class Mine(RewardFunction):
    def compute_reward(self, turns, context=None):
        return 0.5

def train():
    with Scorer(Mine(timeout=20)) as scorer:
        session = scorer.start(1)
        session.submit(0, [Turn("assistant", "x")])
        print(session.collect().totals_N.tolist())
"""


def run_python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_a_reward_of_the_training_script_works(tmp_path):
    (tmp_path / "train.py").write_text(f"{SCRIPT}\nif __name__ == '__main__':\n    train()\n")
    done = run_python("train.py", cwd=tmp_path)
    assert done.stdout == "[0.5]\n", done.stderr


def test_a_script_without_main_guard_gets_told(tmp_path):
    (tmp_path / "train.py").write_text(f"{SCRIPT}\ntrain()\n")
    done = run_python("train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "put what starts it under `if __name__ == '__main__':`" in done.stderr


def test_a_reward_of_typed_in_code_gets_told():
    done = run_python("-c", f"{SCRIPT}\ntrain()\n")
    assert done.returncode == 1
    assert "defined in a notebook or in typed-in code: define it at the top level" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hung_worker_does_not_outlive_a_killed_parent(tmp_path):
    body = f"import os\n        open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n        while True: pass"
    script = SCRIPT.replace("return 0.5", body).replace("timeout=20", "timeout=0.5")
    (tmp_path / "train.py").write_text(f"{script}\nif __name__ == '__main__':\n    train()\n")
    parent = subprocess.Popen([sys.executable, "train.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    pid_file = tmp_path / "pid"
    _wait(lambda: pid_file.exists() and pid_file.read_text() != "")
    parent.kill()
    parent.wait()
    _wait(lambda: _has_ended(int(pid_file.read_text())))


def _wait(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _has_ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"  # ended, but not yet waited for
    except FileNotFoundError:
        return True
