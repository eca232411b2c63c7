"""Every causal language model that transformers has: right, or refused at the start?

    python benchmarks/check_models.py [--only gemma3,phi3] [--trl] [--page docs/models.md]

Of each class the smallest model is built (`small_models.py`) and saved to disk, and from there on everything is done
as for a user's model: it is loaded, scored against the model's own forward, sampled greedily against `generate`, at
lengths beyond every threshold; trained for two steps by `Trainer.fit`; resumed from the checkpoint between them.
`--trl` has TRL's GRPOTrainer train it for two steps, too, and lists what TRL trains and we do not. Each model has a
process of its own, which is killed after `--limit` seconds. Results are JSON lines (`--results`), so that a run goes on
where the last one stopped; the page is made of all of them. Exit code 1 if any model is neither right nor refused.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from models_page import only_trl_trains, write_page
from small_models import EOS, LONG, PAD, WINDOW, Entry, entries, full_class, save_small_model
from torch import Tensor

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import GRPO
from stateset_lightning.errors import UserError
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, load_model, load_tokenizer
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.rollout.cpu_decoding import has_llama_layers
from stateset_lightning.rollout.running_batch import batch_kinds

TOLERANCE = 1e-5  # of log-probs in float32, in nats
TIE = 1e-4  # two tokens whose log-probs are that close may take each other's place
SHARING = 256  # tokens of a prompt from which its group shares it while sampling
NEW_TOKENS = 20
LENGTHS = [5, WINDOW - 6, LONG - 8, 3 * WINDOW + 7, SHARING + 44]
"""Of prompts: short, and those whose completions cross the window, the long table, several windows, and sharing."""

OK, REFUSED, WRONG, CRASH, KILLED, NOT_BUILT, SKIPPED = "ok", "refused", "wrong", "crash", "killed", "not built", "-"


class Wrong(Exception):
    """Something that ran gave another result than the model itself."""


class Model:
    """A small model on disk, and what is done with it; each public method below is a check."""

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        self.facts: dict[str, Any] = {}

    def build(self) -> None:
        model = save_small_model(self.entry, self.folder)
        config = model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
        self.facts |= {"class": type(model).__name__, "layers": sorted(set(kinds)), "vocabulary": config.vocab_size}

    def load(self) -> None:
        self.policy = Policy(load_model(self._config()), self._config())
        self.policy.prepare_for(max(LENGTHS) + NEW_TOKENS)  # as a run does that knows its longest prompt
        self.facts["scoring"] = self.policy.scoring

    def scoring(self) -> None:
        """Log-probs of groups of all lengths together, against the model's own forward a row at a time."""
        generator = torch.Generator().manual_seed(1)
        draw = lambda length: torch.randint(3, 256, (length,), generator=generator).tolist()  # noqa: E731
        groups = [Group(draw(length), [draw(NEW_TOKENS), draw(7)]) for length in LENGTHS]
        found, own = self.policy.score_without_gradient(groups)[0], self._own()
        alone = torch.cat([self.policy.score_without_gradient([group])[0] for group in groups])
        if (off := (found - alone).abs().max().item()) > 10 * TOLERANCE:
            raise Wrong(f"log-probs differ by up to {off:.1e} nats with the other groups of a batch")
        longest = 0
        for long in (0, max(LENGTHS) + NEW_TOKENS):
            rows = [(group.prompt, completion) for group in groups for completion in group.completions]
            expected = torch.cat([_logprobs(own, *row, long) for row in rows])
            difference = (found - expected).abs().max().item()
            longest = longest or difference
            if difference <= max(TOLERANCE, 2 * self._noise(own, groups[-1])):
                return
            if not self._changes_tables():
                break
        raise Wrong(f"log-probs differ by up to {longest:.1e} nats from the model's own forward")

    def greedy(self) -> None:
        """Greedy tokens against `generate`, and their log-probs against the model's own forward."""
        own, engine = self._own(), InProcessEngine(load_tokenizer(self._config()))
        engine.sync(self.policy)
        generator = torch.Generator().manual_seed(2)
        prompts = [torch.randint(3, 256, (length,), generator=generator).tolist() for length in LENGTHS]
        sampling = RolloutConfig(num_generations=2, max_new_tokens=NEW_TOKENS)
        # In the second, a prompt is long enough to be shared.
        for batch in (prompts[:-1], [prompts[0], prompts[-1]]):
            rollout = engine.generate(batch, 2, sampling, range(2 * len(batch)), greedy=True)
            logprobs = rollout.logprobs_T.split(rollout.lengths_N.tolist())
            kinds = batch_kinds(self.policy.model, max(map(len, batch)))
            kind, is_fast = engine._exact_way(kinds, has_llama_layers(self.policy.model))
            self.facts["sampling"] = "batch" if kind else "generate" if is_fast else "no cache"
            completions = rollout.completions()
            for n, (tokens, sampled) in enumerate(zip(completions, logprobs, strict=True)):
                self._compare_logprobs(own, batch[n // 2], tokens, sampled)
            if not self._changes_tables():  # `generate` would do so in the middle of a completion
                for prompt, pair in zip(batch, zip(completions[::2], completions[1::2], strict=True), strict=True):
                    self._compare_tokens(own, prompt, pair)

    def _compare_logprobs(self, own: Any, prompt: list[int], tokens: list[int], sampled: Tensor) -> None:
        longs = (0, max(LENGTHS) + NEW_TOKENS) if self._changes_tables() else (0,)
        own_TV = [_all_logprobs(own, [*prompt, *tokens], len(prompt), long) for long in longs]
        own_T = [rows.gather(-1, torch.tensor(tokens)[:, None])[:, 0] for rows in own_TV]
        off = min((sampled - each).abs().max().item() for each in own_T)
        if off > 10 * TOLERANCE:
            raise Wrong(f"sampled log-probs differ by {off:.1e} nats from the model's own, prompt of {len(prompt)}")
        if min((rows.max(-1).values - each).max() for rows, each in zip(own_TV, own_T, strict=True)) > TIE:
            raise Wrong(f"a greedy token is not the likeliest by the model's own forward, prompt of {len(prompt)}")

    def _compare_tokens(self, own: Any, prompt: list[int], completions: Sequence[list[int]]) -> None:
        """Of one prompt, against what `generate` makes of it."""
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW_TOKENS}
        try:
            with torch.no_grad():
                expected = own.generate(ids, **options, pad_token_id=PAD, eos_token_id=EOS)[0, len(prompt) :].tolist()
        except Exception:  # theirs to mend: the forward alone is the judge then
            self.facts["generate"] = "`generate` raises"
            return
        for tokens in completions:
            place = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
            if place is None:
                if len(tokens) != len(expected):
                    raise Wrong(f"{len(tokens)} tokens, `generate` gives {len(expected)}, prompt of {len(prompt)}")
                continue
            best = _all_logprobs(own, [*prompt, *tokens[:place], PAD], len(prompt) + place, 0)[0]
            if best.max() - best[tokens[place]] > TIE:
                raise Wrong(f"greedy token {place} differs from that of `generate`, prompt of {len(prompt)}")
            if best.max() - best[expected[place]] > TIE:
                self.facts["generate"] = "`generate` differs from the model's own forward"

    def train(self) -> None:
        """Two steps, with a checkpoint after each."""
        trainer = self._fit("whole", None)
        first = load_model(self._config()).state_dict()
        trained = trainer.lightning_module.policy.model.state_dict()
        if all(torch.equal(first[name], value) for name, value in trained.items() if name in first):
            raise Wrong("two steps of training leave every weight as it was")
        self._trained = {name: value.clone() for name, value in trained.items()}

    def resume(self) -> None:
        """The second step again, from the first one's checkpoint: bit by bit the same weights."""
        (checkpoint,) = (self.folder / "whole").glob("*step=1*.ckpt")
        again = self._fit("resumed", checkpoint).lightning_module.policy.model.state_dict()
        if differing := [name for name, value in self._trained.items() if not torch.equal(again[name], value)]:
            raise Wrong(f"the resumed run ends with other weights, such as {differing[0]}")

    def half(self) -> None:
        """Two steps in bfloat16, whose sampling differs from scoring by less than the run allows; notes which share."""
        module = self._fit("half", None, precision="bf16-true").lightning_module
        off, limit = module.metrics.last["policy/sampling_difference"], module.engine._limits.get(1.0)
        self.facts["bf16"] = f"{off / limit if limit else 0.0:.2f}"

    def lora(self) -> None:
        """An adapter that changes outputs: sampling with it merged agrees with scoring."""
        config = PolicyConfig(str(self.folder), lora=LoRAConfig(rank=2))
        policy = Policy(load_model(config), config)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        engine = InProcessEngine(load_tokenizer(config))
        engine.sync(policy)
        prompts = [list(range(3, 3 + length)) for length in LENGTHS[:4]]
        rollout = engine.generate(prompts, 2, RolloutConfig(max_new_tokens=6), range(2 * len(prompts)))
        rows = rollout.completions()
        groups = [Group(prompt, rows[2 * i : 2 * i + 2]) for i, prompt in enumerate(prompts)]
        difference = (policy.score_without_gradient(groups)[0] - rollout.logprobs_T).abs().max().item()
        if difference > 100 * TOLERANCE:  # the adapter is large, and so is the rounding of cached states
            raise Wrong(f"with an adapter, sampling and scoring differ by up to {difference:.1e} nats")
        policy.score(groups[:1])[0].sum().backward()
        if not any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters()):
            raise Wrong("no weight of the adapter gets a gradient")

    def trl(self) -> None:
        """TRL's GRPOTrainer, two steps."""
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        rows = Dataset.from_list([{"prompt": prompt} for prompt in _prompts()])
        options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5, "max_steps": 2}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        trainer = GRPOTrainer(
            model=str(self.folder),
            processing_class=load_tokenizer(self._config()),
            reward_funcs=lambda completions, **columns: [_reward(text) for text in completions],
            train_dataset=rows,
            args=GRPOConfig(output_dir=str(self.folder / "trl"), **options, **quiet, gradient_checkpointing=False),
        )
        trainer.train()
        if trainer.state.global_step != 2:
            raise Wrong(f"{trainer.state.global_step} steps instead of 2")

    # What the checks share

    def _config(self) -> PolicyConfig:
        return PolicyConfig(str(self.folder))

    def _own(self) -> Any:
        """The model as transformers loads it, and nothing of ours."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder)
        return full_class(config).from_pretrained(self.folder, dtype=torch.float32).eval()

    def _changes_tables(self) -> bool:
        """Whether its rotary frequencies depend on the longest text of a forward."""
        return any(kind in (self.folder / "config.json").read_text() for kind in ('"longrope"', '"dynamic"'))

    def _noise(self, own: Any, group: Group) -> float:
        """How far the model's own log-probs of a row move when another row is beside it: float error, in nats."""
        row = [*group.prompt, *group.completions[0]]
        alone = _logprobs(own, group.prompt, group.completions[0], 0)
        with torch.no_grad():
            logits = own(input_ids=torch.tensor([row, row[::-1], row]), use_cache=False).logits[0].float()
        targets = torch.tensor(row[len(group.prompt) :])
        beside = logits[len(group.prompt) - 1 : len(row) - 1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return min((alone - beside).abs().max().item(), 1e-4)

    def _fit(self, name: str, checkpoint: Path | None, precision: str = "32-true") -> Trainer:
        seed_everything(7, verbose=False)
        module = GRPOLightningModule(
            str(self.folder),
            reward=lambda turns, context: _reward(turns[-1].content),
            rollout=RolloutConfig(num_generations=4, max_new_tokens=5),
            algorithm=GRPO(beta=0.0),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        )
        saves = ModelCheckpoint(self.folder / name, every_n_train_steps=1, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options = {"max_steps": 2, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "callbacks": [saves]}
        options["precision"] = precision
        trainer = Trainer(**options, **quiet, use_distributed_sampler=False, default_root_dir=self.folder / name)
        data = ScenarioDataModule(train=[{"prompt": p} for p in _prompts()], batch_size=2, use_chat_template=False)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        if trainer.global_step != 2:
            raise Wrong(f"{trainer.global_step} steps instead of 2")
        return trainer


CHECKS = ("build", "load", "scoring", "greedy", "train", "resume", "half", "lora")
"""In this order; `build` and `load` are needed by the rest, `train` by `resume`."""


def _prompts() -> list[str]:
    """Short ones and one that is long enough to be shared, in turn."""
    return [text for i in range(4) for text in (f"What is {i} + {2 * i}?", f"{i}a b c d e f " * 25)]


def _reward(text: str) -> float:
    """Some number that differs between completions."""
    return sum(text.encode()) % 97 / 97


def _all_logprobs(own: Any, row: Sequence[int], start: int, long: int) -> Tensor:
    """The model's own log-probs [tokens, V] of what follows `start` tokens of a row; `long`: see `_logprobs`."""
    filler = [5] * max(0, long - len(row))
    with torch.no_grad():
        logits = own(input_ids=torch.tensor([[*row, *filler]]), use_cache=False).logits[0].float()
    return logits[start - 1 : len(row) - 1].log_softmax(-1)


def _logprobs(own: Any, prompt: Sequence[int], completion: Sequence[int], long: int) -> Tensor:
    """The model's own log-probs of a completion, nothing beside it.

    Args:
        own: The model.
        prompt: Token ids.
        completion: Token ids.
        long: The row is continued to so many tokens, which chooses the tables of rotary frequencies.
    """
    logps = _all_logprobs(own, [*prompt, *completion], len(prompt), long)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]


# A process per model


def _said(error: BaseException) -> str:
    """An error in one line, with the place of a crash."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, Wrong):
        return f"{WRONG}: {text}"
    if isinstance(error, UserError):
        return f"{REFUSED}: {text}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "stateset_lightning" in f.filename]
    through = f", from {Path(ours[-1].filename).name} {ours[-1].name}" if ours else ""
    return f"{CRASH}: {type(error).__name__}: {text} ({Path(frame.filename).name} {frame.name}{through})"


def _child(entry: Entry, checks: Sequence[str], pipe: Connection) -> None:
    """Sends (check, state, CPU seconds, facts) after each check, and nothing after the last."""
    gc.freeze()  # what was there before the fork: collecting would copy its pages
    devnull = open(os.devnull, "w")  # noqa: SIM115 (the process ends with it)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(devnull), redirect_stderr(devnull):
        model, states = Model(entry, Path(folder)), dict.fromkeys(CHECKS, "")
        for check in checks:
            began = time.process_time()
            needs = {
                "build": [],
                "load": ["build"],
                "resume": ["train"],
                "trl": ["build"],
                "train": ["build"],
                "half": ["build"],
            }
            if any(states[need] != OK for need in needs.get(check, ["build", "load"])):
                states[check] = SKIPPED
            else:
                try:
                    getattr(model, check)()
                    states[check] = OK
                except (Exception, SystemExit) as error:
                    said = _said(error).replace(folder, "FOLDER")
                    states[check] = f"{NOT_BUILT}: {said}" if check == "build" else said
            gc.collect()
            pipe.send((check, states[check], time.process_time() - began, model.facts))


def check_model(name: str, entry: Entry, checks: Sequence[str], limit: float) -> dict[str, Any]:
    """A row of the results: what each check said, in a process that is killed after `limit` seconds."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(entry, checks, sending))
    process.start()
    sending.close()
    row: dict[str, Any] = {"model": name, "states": {}, "seconds": {}}
    end = time.monotonic() + limit
    try:
        for check in checks:
            if not receiving.poll(max(0.0, end - time.monotonic())):
                row["states"][check] = f"{KILLED}: after {limit:g} s"
                break
            check, row["states"][check], seconds, facts = receiving.recv()
            row["seconds"][check] = round(seconds, 2)
            row |= facts
    except EOFError:
        process.join()
        row["states"][check] = f"{CRASH}: the process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return row


def is_right(row: dict[str, Any]) -> bool:
    """Whether a user of the model gets the right result, or a refusal; TRL's side does not count."""
    return not any(state.startswith((WRONG, CRASH, KILLED)) for check, state in row["states"].items() if check != "trl")


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """By model; a later line adds to an earlier one's checks."""
    rows: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        before = rows.get(row["model"], {"states": {}, "seconds": {}})
        rows[row["model"]] = {**before, **row, **{key: before[key] | row[key] for key in ("states", "seconds")}}
    return rows


def failures(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each check that fails, and one for each model that TRL trains and we do not."""
    for name, row in rows.items():
        for check, state in row["states"].items():
            if check != "trl" and state.startswith((WRONG, CRASH, KILLED)):
                yield f"{name} {check}: {state}"
        if only_trl_trains(row):
            yield f"{name}: TRL trains it, we do not"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="names with commas between")
    parser.add_argument("--trl", action="store_true", help="let TRL train each model as well")
    parser.add_argument("--again", action="store_true", help="check also what the results already have")
    parser.add_argument("--results", type=Path, default=Path("runs/models.jsonl"))
    parser.add_argument("--page", type=Path, help="write the table of docs/models.md there")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a model")
    parser.add_argument("--slices", default="1/1", help="such as 2/3: every third model, from the second on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.trl and find_spec("trl") is None:
        print("trl is not installed: its side is left out")
        args.trl = False
    if args.trl:
        import trl  # noqa: F401 (before the first fork)
        from trl import GRPOTrainer  # noqa: F401
    every = entries()
    if unknown := sorted(set(args.only.split(",")) - set(every) if args.only else ()):
        parser.error(f"--only: unknown {', '.join(unknown)}")
    part, parts = map(int, args.slices.split("/"))
    names = args.only.split(",") if args.only else list(every)[part - 1 :: parts]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, start=1):
        known = {} if args.again else read_results(args.results).get(name, {}).get("states", {})
        missing = [check for check in (*CHECKS, *(["trl"] if args.trl else [])) if check not in known]
        if not missing or known.get("build", OK) != OK:
            continue
        asked = missing if "build" in missing else ["build", *missing]
        row = check_model(name, every[name], asked, args.limit)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = "; ".join(f"{check} {state}" for check, state in row["states"].items() if state not in (OK, SKIPPED))
        print(f"{number}/{len(names)} {name} {sum(row['seconds'].values()):.1f} s: {said or OK}", flush=True)
    found = read_results(args.results)
    rows = {name: found.get(name, {"model": name, "states": {}, "seconds": {}}) for name in every}
    if args.page:
        write_page(args.page, rows, LENGTHS, WINDOW, LONG)
    shown = {name: found[name] for name in names if name in found}
    for line in (lines := list(failures(shown))):
        print(line)
    print(
        f"{len(shown)} models, {sum(map(is_right, shown.values()))} right, refused or not built; {len(lines)} failures"
    )
    return 0 if all(map(is_right, shown.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
