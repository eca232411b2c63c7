"""Makes the files of this folder, with the code of version 0.1.0: a small model, three runs, what they come to, and exported folders.

    mkdir /tmp/run && cp make.py /tmp/run && cd /tmp/run && PYTHONPATH=<checkout of 277a8de> python make.py

Later versions must read these files as they are: make them again only where version 0.1 itself is to be proved otherwise.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from stateset_lightning.cli import main
from stateset_lightning.policy import PolicyConfig, load_tokenizer

ROWS = [
    {"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a, b in ((3, 4), (9, 1), (2, 6), (5, 5), (8, 7), (1, 9), (4, 8), (7, 2))
]
MIDDLE, END = 3, 5
CLASSES = {
    "algorithm": "stateset_lightning.algorithm.GRPO",
    "reward": "stateset_lightning.rewards",
    "logger": "lightning.pytorch.loggers.CSVLogger",
    "checkpoint": "lightning.pytorch.callbacks.ModelCheckpoint",
}


def config(name: str, policy: dict[str, Any], algorithm: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """A run's config; the optimizer's large eps keeps what float arithmetic of another machine changes from being blown up."""
    rewards = [("RegexMatch", {"pattern": "[0-4]$"}), ("Contains", {"strings": ["7", "8", "9"], "require": "any", "weight": 0.5})]
    checkpoint = {"filename": "middle", "every_n_train_steps": MIDDLE}
    return {
        "seed_everything": 3,
        "model": {
            "policy": {"model_name": "model", **policy},
            "reward": [{"class_path": f"{CLASSES['reward']}.{kind}", "init_args": given} for kind, given in rewards],
            "rollout": {"num_generations": 4, "max_new_tokens": 5, "temperature": 1.5},
            "algorithm": {"class_path": CLASSES["algorithm"], "init_args": algorithm},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "eps": 0.001}},
            "lr_scheduler": {"decay": "linear", "warmup_steps": 2},
        },
        "data": {
            "train": "rows.jsonl",
            "validation": "rows.jsonl",
            "predict": "rows.jsonl",
            "batch_size": 4,
            "system_prompt": "Only digits.",
            **data,
        },
        "trainer": {
            "max_steps": END,
            "max_epochs": -1,
            "accelerator": "cpu",
            "devices": 1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "logger": {"class_path": CLASSES["logger"], "init_args": {"save_dir": ".", "name": name}},
            "callbacks": [{"class_path": CLASSES["checkpoint"], "init_args": checkpoint}],
            **trainer,
        },
    }


KL = {"beta": 0.1, "kl": {"target": 0.01}}
RUNS = {
    "whole": config("whole", {}, KL, {"curriculum": {"floor": 0.2}}, {"gradient_clip_val": 1.0}),
    "lora": config("lora", {"lora": {"rank": 2, "alpha": 8, "dropout": 0.1}}, KL, {}, {}),
    # Two passes of two optimizer steps over an episode, of two micro-steps each: at MIDDLE its second pass is half done.
    "episode": config("episode", {"dropout": 0.1}, KL, {"num_iterations": 2, "steps_per_episode": 4}, {"accumulate_grad_batches": 2}),
}


def save_model(folder: str) -> None:
    """A random Llama that says digits alone: the first of its hidden values is constant, and the head reads a bias from it.

    Its attention is sharp, so that answers differ from prompt to prompt.
    """
    tokenizer = load_tokenizer(PolicyConfig("tiny"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": 384, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "max_position_embeddings": 256}
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.5, tie_word_embeddings=False))
    said = torch.tensor([1, *tokenizer.convert_tokens_to_ids(list("0123456789"))])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = -20.0
        model.lm_head.weight[said, 0] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reward(name: str, *words: str) -> float:
    cli: Any = main(["validate", "--config", f"{name}.yaml", "--trainer.logger=false", *words])
    return float(cli.trainer.callback_metrics["val/reward"])


def answers(*words: str) -> list[str]:
    """The greedy completion of each row's prompt."""
    sys.stdin = io.StringIO("".join(row["prompt"] + "\n" for row in ROWS))
    with redirect_stdout(io.StringIO()) as said:
        main(["generate", "--device", "cpu", *words])
    return said.getvalue().splitlines()[-len(ROWS) :]


def make(name: str) -> dict[str, Any]:
    """One run without interruption; of its files, the checkpoint of its middle and its resolved config are kept."""
    Path(f"{name}.yaml").write_text(yaml.safe_dump(RUNS[name], sort_keys=False))
    cli: Any = main(["fit", "--config", f"{name}.yaml"])
    run = Path(name, "version_0")
    middle, end = run / "checkpoints" / "middle.ckpt", run / "checkpoints" / "end.ckpt"
    cli.trainer.save_checkpoint(end)
    main(["export", str(end), f"exported/{name}"])
    found = {at.stem: {"reward": reward(name, "--ckpt_path", str(at)), "answers": answers("--ckpt_path", str(at))} for at in (middle, end)}
    for path in [*run.iterdir(), *run.glob("checkpoints/*")]:
        if path.is_file() and path not in (middle, run / "config.yaml"):
            path.unlink()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for made in ("model", "exported", *RUNS):
        shutil.rmtree(made, ignore_errors=True)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_model("model")
    Path("expected.json").write_text(json.dumps({name: make(name) for name in RUNS}, indent=1) + "\n")
