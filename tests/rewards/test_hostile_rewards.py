"""Rewards that fork, leak, start processes of their own, or change global random state do not reach the run."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from module_runs import fit, weights
from own_modules import own_module

from stateset_lightning import GRPOLightningModule, RolloutConfig
from stateset_lightning.policy import PolicyConfig, load_model
from stateset_lightning.rewards import RewardFunction, Scorer, failure_counts
from stateset_lightning.types import Turn
from stateset_lightning.workers import pool

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CODE = """
import os, subprocess, sys, time
from stateset_lightning.rewards import RewardFunction, RewardResult

KEPT = []

class Doing(RewardFunction):
    def compute_reward(self, turns, context=None):
        order = turns[-1].content
        if order == "fork":
            os.fork()  # both return
        if order == "memory":
            raise MemoryError
        if order == "leak":
            KEPT.append(b"x" * 40_000_000)
        if order == "far child":
            child = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
            with open(context["pid_file"], "w") as file:
                file.write(str(child.pid))
            time.sleep(60)
        return RewardResult(float(order) if order.isdigit() else 1.0, {"pid": os.getpid()})
"""


@pytest.fixture(scope="module")
def doing(tmp_path_factory):
    with own_module(tmp_path_factory.mktemp("hostile_code"), "doing_rewards", CODE) as doing_rewards:
        yield doing_rewards.Doing


def run(scorer, texts, context=None):
    session = scorer.start(len(texts))
    for n, text in enumerate(texts):
        session.submit(n, [Turn("assistant", text)], context)
    return session.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_in_a_worker_does_not_answer_twice(doing, monkeypatch):
    monkeypatch.setattr(pool, "MAX_WORKERS", 1)
    with Scorer(doing(timeout=20)) as scorer:
        for i in range(5):  # a second answer would be taken for that of the next request
            assert run(scorer, ["fork", str(i), "7"]).totals_N.tolist() == [1.0, i, 7.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_in_this_process_leaves_no_second_trainer(tmp_path):
    script = (
        "import os, sys\nfrom stateset_lightning.rewards import Scorer\nfrom stateset_lightning.types import Turn\n"
        "def forks(turns, context):\n    os.fork()\n    return 1.0\n"
        "with Scorer(forks) as scorer:\n    session = scorer.start(3)\n"
        "    [session.submit(n, [Turn('assistant', 'x')]) for n in range(3)]\n"
        "    print(session.collect().totals_N.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("[1.0, 1.0, 1.0]\n", 0), done.stderr


@linux
def test_a_time_out_kills_an_endless_child_in_a_session_of_its_own(doing, tmp_path):
    with Scorer(doing(timeout=1.5)) as scorer:
        scores = run(scorer, ["far child", "3"], {"pid_file": str(tmp_path / "pid")})
    assert failure_counts(scores) == {"reward_failures/doing/TimeoutError": 1}
    assert scores.totals_N[1] == 3
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@linux
def test_a_worker_that_leaks_is_replaced(doing, monkeypatch):
    monkeypatch.setattr(pool, "LEAK_BYTES", 100_000_000)
    monkeypatch.setattr(pool, "MAX_WORKERS", 1)
    with Scorer(doing(timeout=20)) as scorer:
        pids = [run(scorer, ["leak"]).breakdowns[0]["doing"]["pid"] for _ in range(8)]
    # 40 MB a call: the first is the base, the fourth is beyond it by 120 MB.
    assert pids[:4] == pids[:1] * 4
    assert pids[4] != pids[0]
    assert len(set(pids)) == 2


def test_out_of_memory_is_a_failure_like_others(doing):
    with Scorer(doing(timeout=20)) as scorer:
        assert failure_counts(run(scorer, ["memory", "1"])) == {"reward_failures/doing/MemoryError": 1}


class Length(RewardFunction):
    def compute_reward(self, turns, context=None):
        return float(len(set(turns[-1].content)))


class Reseeding(Length):
    """The same score, after it has drawn from and reseeded every global generator."""

    def compute_reward(self, turns, context=None):
        torch.manual_seed(torch.randint(9, ()).item() + random.randrange(99))
        np.random.seed(np.random.randint(99))
        random.seed(random.random())
        torch.rand(7)
        print("drawn")
        return super().compute_reward(turns, context)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_global_random_state_does_not_reach_the_run(tmp_path, dropout):
    runs = []
    for reward in (Length(), Reseeding()):
        options = {"reward": reward, "rollout": RolloutConfig(num_generations=4, max_new_tokens=5), "optimizer": sgd}
        module = GRPOLightningModule(PolicyConfig("tiny", dropout=dropout), **options)
        runs.append(weights(fit(tmp_path, module, max_steps=3)))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    untrained = load_model(PolicyConfig("tiny")).state_dict()
    assert not all(torch.equal(a, b) for a, b in zip(runs[0].values(), untrained.values(), strict=True))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-3)
