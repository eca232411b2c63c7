"""The event loop behind the scorer."""

import subprocess
import sys

from stateset_lightning.rewards.background import EventLoopThread


def test_closing_an_unused_loop_does_nothing():
    EventLoopThread(1).close()


def test_a_reward_that_hangs_does_not_keep_the_interpreter_alive():
    code = (
        "import time\n"
        "from stateset_lightning.rewards import Scorer\n"
        "from stateset_lightning.types import Turn\n"
        "async def blocks(turns, context): time.sleep(60)\n"
        "scorer = Scorer([lambda turns, context: time.sleep(60), blocks])\n"
        "scorer.start(1).submit(0, [Turn('assistant', 'x')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=20, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
