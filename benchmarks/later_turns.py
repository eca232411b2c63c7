"""Sampling the later turns of conversations: CPU seconds of each turn, with what is kept of turns before and without.

    python benchmarks/later_turns.py MODEL_FOLDER [--prompts 100 400] [--replies 20 20-300] [--conversations 32]

Conversations of three turns of at most 40 tokens (one token in 20 ends a turn), with replies of random tokens between;
`20-300` is a reply of 20 tokens for all but one in eight, which get 300. Each measurement has one thread; the peak of
memory is that above the model, of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoTokenizer

from stateset_lightning.policy import Policy, PolicyConfig, load_model
from stateset_lightning.rollout import InProcessEngine, RolloutConfig

GENERATIONS, TURNS, NEW_TOKENS = 8, 3, 40
ENDS_EVERY = 20


def peak_mb() -> float:
    """The most memory that this process has had since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(model: str, prompt: int, reply: str, conversations: int, keeps: bool) -> tuple[list[float], float]:
    """CPU seconds of each turn, and the peak of memory in MB."""
    torch.set_num_threads(1)
    config = PolicyConfig(model)
    policy = Policy(load_model(config), config)
    engine = InProcessEngine(AutoTokenizer.from_pretrained(model))
    engine.sync(policy)
    vocabulary = policy.model.config.vocab_size
    engine.ends = set(range(2, vocabulary, ENDS_EVERY))
    short, _, long = reply.partition("-")
    torch.manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(vocabulary // 2, vocabulary, (count,)).tolist()

    prompts, size = [words(prompt + i) for i in range(conversations // GENERATIONS)], GENERATIONS
    sampling = RolloutConfig(num_generations=GENERATIONS, max_new_tokens=NEW_TOKENS, max_batch_rows=conversations)
    for length in (9, 300):  # a way of decoding is probed when it is met first
        engine.generate([words(length)], 1, RolloutConfig(num_generations=2, max_new_tokens=2), [1])
    Path("/proc/self/clear_refs").write_text("5")
    start_mb, seconds = peak_mb(), []
    with engine.keeping_caches() if keeps else nullcontext():
        for turn in range(TURNS):
            start = time.process_time()
            said = engine.generate(prompts, size, sampling, range(turn * 1000, turn * 1000 + len(prompts) * size))
            seconds.append(time.process_time() - start)
            whole = [[*prompts[n // size], *tokens] for n, tokens in enumerate(said.completions())]
            going_on = [tokens for tokens, length in zip(whole, said.lengths_N, strict=True) if length < NEW_TOKENS]
            counts = [int(long if long and n % 8 == 3 else short) + n % 5 for n in range(len(going_on))]
            prompts, size = [tokens + words(count) for tokens, count in zip(going_on, counts, strict=True)], 1
    return seconds, peak_mb() - start_mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 400], help="tokens")
    parser.add_argument("--replies", nargs="+", default=["20", "20-300"])
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--one", action="store_true", help="measure in this process; used by the others")
    parser.add_argument("--anew", action="store_true", help="keep nothing, with --one")
    options = parser.parse_args()
    if options.one:
        given = options.prompts[0], options.replies[0], options.conversations
        print(json.dumps(measure(options.model, *given, keeps=not options.anew)))
        return
    print("| prompt | reply | kept: turns 1, 2, 3 | peak MB | anew | peak MB |\n|---|---|---|---|---|---|")
    for prompt in options.prompts:
        for reply in options.replies:
            cells = []
            for more in ([], ["--anew"]):
                words = [sys.executable, __file__, options.model, "--one", "--prompts", str(prompt), "--replies", reply]
                words += ["--conversations", str(options.conversations), *more]
                run = subprocess.run(words, capture_output=True, text=True, check=True)
                seconds, peak = json.loads(run.stdout.splitlines()[-1])
                cells += [", ".join(f"{s:.1f}" for s in seconds), f"{peak:.0f}"]
            print(f"| {prompt} | {reply} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
