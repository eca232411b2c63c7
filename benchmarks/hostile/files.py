"""Cases of hostile files: data, configs, checkpoints, model folders, what lies in a run's folder, guides, and outputs
that would be written over inputs.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import CONFIG, ROWS, TEXTS, Place, Plan, damaged, hostile_value, leaves, put
from foreign_code import OWN_CODE

COLUMNS = ("prompt", "messages", "target", "id", "topic", "context", "rewards", "user_responses", "path", "x", "")


class Pickled:
    """Would leave a file, were it unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


# Data -----------------------------------------------------------------------------------------------------------------


def hostile_rows(rng: random.Random) -> list[Any]:
    rows: list[Any] = []
    for row in ROWS:
        new: Any = dict(row)
        for _ in range(rng.randrange(3)):
            new[rng.choice(COLUMNS)] = hostile_value(rng)
        rows.append(hostile_value(rng) if rng.random() < 0.1 else new)
    return rows


def alias_bomb(rng: random.Random) -> str:
    names = [f"n{number}" for number in range(rng.choice((8, 30)))]
    lines = ["- prompt: x", f"  {names[0]}: &{names[0]} [x, x, x, x, x, x, x, x, x]"]
    for old, new in itertools.pairwise(names):
        lines.append(f"  {new}: &{new} [{', '.join([f'*{old}'] * 9)}]")
    column = rng.choice(("target", "context", "prompt", "id", "messages"))
    return "\n".join([*lines, f"- {{prompt: y, {column}: *{names[-1]}}}", "- {prompt: z}"])


def row_text(place: Place) -> tuple[str, bytes]:
    """A data file: its name and what it holds."""
    rng = place.rng
    good = "".join(json.dumps(row) + "\n" for row in ROWS)
    deep = rng.choice((200, 3_000, 100_000))
    makers: tuple[Callable[[], tuple[str, str | bytes]], ...] = (
        lambda: ("a.jsonl", "".join(json.dumps(row) + "\n" for row in hostile_rows(rng))),
        lambda: ("a.json", json.dumps(hostile_rows(rng))),
        lambda: ("a.yaml", json.dumps(hostile_rows(rng), indent=1)),  # which is YAML, too
        lambda: ("a.jsonl", damaged(good.encode(), rng)),
        lambda: ("a.json", damaged(json.dumps(ROWS).encode(), rng)),
        lambda: ("a.yaml", damaged(yaml.safe_dump(ROWS).encode(), rng)),
        lambda: ("a.csv", damaged(b'prompt,target\n"a,b",1\nc,2\n', rng)),
        lambda: ("a.csv", f"prompt,target\n{'x' * 300_000},1\n" + '"' * 9),
        lambda: ("a.csv", "prompt,prompt,,\n" + ",".join(rng.choice(TEXTS) for _ in range(5))),
        lambda: ("a.parquet", damaged(b"PAR1" + rng.randbytes(200) + b"PAR1", rng)),
        lambda: ("a.jsonl", '{"prompt": ' + "[" * deep + "]" * deep + "}\n" + good),
        lambda: ("a.json", "[" * deep),
        lambda: ("a.yaml", "- prompt: " + "[" * deep),
        lambda: ("a.yaml", "- prompt: x\n  target: " + "{a: " * deep + "}" * deep),
        lambda: ("a.yaml", alias_bomb(rng)),
        lambda: ("a.yaml", "- &a [*a]\n- {prompt: x, target: *a}"),
        lambda: ("a.yaml", f"- prompt: x\n  target: {'9' * rng.choice((400, 6_000))}"),
        lambda: ("a.yaml", '- prompt: !!python/object/apply:os.system ["touch ../executed"]'),
        lambda: ("a.yaml", "- {prompt: x, <<: [{a: 1}, {b: 2}], ? [1, 2] : 3, ? {a: b} : 4}"),
        lambda: ("a.jsonl", f'{{"prompt": "x", "target": {"9" * rng.choice((400, 6_000))}}}\n' + good),
        lambda: ("a.jsonl", '{"prompt": "\\ud800", "target": "\\udfff\\u2028"}\n' + good),
        lambda: ("a.jsonl", '{"prompt": "a", "target": NaN, "x": 1e999, "x": 2}\n' + good),
        lambda: ("a.jsonl", good.replace("What", "Wh\u2028\x85at")),
        lambda: ("a.jsonl", good.encode("utf-16")),
        lambda: ("a.jsonl", b"\xef\xbb\xbf" + good.encode()),
        lambda: ("a.jsonl.gz", b"\x1f\x8b" + rng.randbytes(50)),
        lambda: ("a.jsonl", ""),
        lambda: ("a.json", '{"prompt": "x"}'),
        lambda: ("a.txt", good),
        lambda: ("a.jsonl", json.dumps({"prompt": "x" * 3_000_000}) + "\n" + good),
        lambda: ("a.jsonl", json.dumps({"prompt": "x", "target": "y" * 3_000_000}) + "\n" + good),
    )
    name, content = rng.choice(makers)()
    return name, content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


def hostile_path(place: Place) -> str:
    """A place of data where no ordinary file is."""
    rng, work = place.rng, place.work
    (work / "folder.jsonl").mkdir()
    os.mkfifo(work / "pipe.jsonl")
    (work / "loop.jsonl").symlink_to("loop.jsonl")
    (work / "gone.jsonl").symlink_to("nowhere")
    (work / "zero.jsonl").symlink_to("/dev/zero")
    named = ("folder.jsonl", "pipe.jsonl", "loop.jsonl", "gone.jsonl", "zero.jsonl", "*.jsonl", "**/*", "*.nothing")
    devices = ("/dev/zero", "/dev/stdin", "/dev/null", "/dev/random", "/dev/fd/0", "/proc/self/mem", "/dev/full", "/")
    chains = ("rows.jsonl::x", "simplecache::rows.jsonl", "file://rows.jsonl", "memory://x.jsonl", "x://rows.jsonl")
    others = ("", " ", "~", "a\0b.jsonl", "x" * 5_000 + ".jsonl", "https://127.0.0.1:1/x.jsonl", "../work", "[", "-")
    return rng.choice(named + devices + chains + others)


def data_plan(place: Place) -> Plan:
    rng = place.rng
    if rng.random() < 0.3:
        path = hostile_path(place)
        title = f"data is {path[:40]!r}"
    else:
        path, content = row_text(place)
        (place.work / path).write_bytes(content)
        title = f"data in {path}: {content[:60]!r}"
    split = rng.choice(("train", "train", "validation", "predict"))
    place.config({f"data.{split}": path if rng.random() < 0.7 else [{"path": path, "weight": 1}]})
    command = {"train": "fit", "validation": "validate", "predict": "predict"}[split]
    return Plan([command, "--config", "config.yaml", *place.flags()], f"{command}: {title}")


# Configs --------------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    -1,
    0,
    1,
    0.5,
    1e30,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "text",
    "1e-4",
    [],
    [1],
    {},
    {"a": 1},
    "💥",
)
OUTPUTS = ("save_dir", "name")
"""Options that say where files go: what the user names there, is the user's word."""


def hostile_config(place: Place) -> str:
    """A config with something wrong in it."""
    rng = place.rng
    config = place.config()
    text = yaml.safe_dump(config)
    kind = rng.randrange(8)
    if kind < 3:
        place_of = rng.choice([leaf for leaf in leaves(config) if leaf[-1] not in OUTPUTS])
        put(config, place_of, rng.choice(VALUES) if rng.random() < 0.6 else hostile_value(rng, 2))
        return json.dumps(config, indent=1)  # which is YAML, too
    if kind == 3:
        section = rng.choice(("model", "data", "trainer", "samples"))
        config[section] = rng.choice(VALUES)
        return yaml.safe_dump(config)
    if kind == 4:
        optimizer = rng.choice(("SparseAdam", "LBFGS", "Rprop", "Optimizer", "nothing", "lr_scheduler.OneCycleLR"))
        config["model"]["optimizer"] = {"class_path": f"torch.optim.{optimizer}", "init_args": {"lr": 1e-3}}
        return yaml.safe_dump(config)
    if kind == 5:
        deep = rng.choice((100, 3_000, 30_000))
        additions = (
            "x: " + "[" * deep,
            "x: " + "{a: " * deep + "}" * deep,
            "".join(" " * min(n, 900) + "a:\n" for n in range(deep)),
            "x: &x [*x]",
            "data: {system_prompt: *nowhere}",
            "data: {system_prompt: " + "9" * 6_000 + "}",
            "seed_everything: " + "9" * 6_000,
            "? [1]\n: 2",
            "%YAML 9.9\n---",
            "---\na: 1\n---\nb: 2",
            "\tx: 1",
            "x: !!binary '###'",
            "x: !!timestamp nope",
            "x: !!python/name:os.system",
            "data: {chat_template_kwargs: " + "&b [" + "x, " * 9 + "]}",
        )
        return text + rng.choice(additions) + "\n"
    if kind == 6:
        width, depth = 9, rng.choice((7, 30))
        lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
        where = rng.choice(("chat_template_kwargs: {x: *last}", "system_prompt: *last", "fields: *last"))
        return "\n".join([*lines, text.replace("data:\n", f"data:\n  {where}\n").replace("*last", f"*a{depth - 1}")])
    return damaged(text.encode(), rng).decode("latin-1")


def config_plan(place: Place) -> Plan:
    rng = place.rng
    kind = rng.random()
    command = rng.choice(("fit", "fit", "validate", "predict"))
    words = [command, "--config", "config.yaml", *place.flags()]
    if kind < 0.8:
        text = hostile_config(place)
        (place.work / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        return Plan(words, f"{command}: a config of {len(text)} characters", outputs=("runs", "lightning_logs"))
    place.config()
    if kind < 0.9:
        given = hostile_path(place)
        place.work.joinpath("config.yaml").unlink()
        return Plan([command, f"--config={given}"], f"{command}: a config at {given[:40]!r}", stdin=b"model: [")
    leaf = rng.choice([leaf for leaf in leaves(CONFIG) if leaf[-1] not in OUTPUTS])
    name = ".".join(map(str, leaf)).replace(".0", "").replace(".init_args", "")
    value = json.dumps(hostile_value(rng, 2)) if rng.random() < 0.5 else str(rng.choice(VALUES))
    value = value.replace("\0", "")[:100_000]
    title = f"{command}: --{name}={value[:60]!r}"
    return Plan([*words, f"--{name}={value}"], title, outputs=("runs", "lightning_logs"))


# Checkpoints and models -----------------------------------------------------------------------------------------------


def with_code(place: Place, folder: Path) -> None:
    """A model folder whose code would leave a file beside the working folder."""
    executed = str(place.root / "executed")
    for name in ("own.py", "modeling.py", "tokenization.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(OWN_CODE.format(executed=executed))
    edit(
        folder / "config.json",
        model_type="own",
        auto_map={
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
            "AutoTokenizer": "own.OwnTokenizer",
        },
    )


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}  # an adapter has some of a model's files
    content.update(changes)
    file.write_text(json.dumps(content))


def hostile_model(place: Place, folder: Path) -> str:
    """Something wrong in a model's folder; what it is."""
    rng, executed = place.rng, place.root / "executed"
    kind = rng.randrange(10)
    if kind == 0:
        with_code(place, folder)
        return "code of its own"
    if kind == 1:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        file = rng.choice(files)
        file.write_bytes(damaged(file.read_bytes(), rng))
        return f"a damaged {file.name}"
    if kind == 2:
        file = rng.choice(sorted(folder.glob("*.json")))
        content = json.loads(file.read_text())
        if found := [leaf for leaf in leaves(content) if leaf]:
            put(content, rng.choice(found), hostile_value(rng, 2))
        file.write_text(json.dumps(content))
        return f"a hostile {file.name}"
    if kind == 3:
        (folder / "model.safetensors").unlink(missing_ok=True)
        with (folder / "pytorch_model.bin").open("wb") as opened:
            if rng.random() < 0.5:
                pickle.dump({"a": Pickled(executed)}, opened)
            else:
                torch.save({"a": Pickled(executed)}, opened)
        return "weights that are a pickle with code"
    if kind == 4:
        template = rng.choice(
            (
                "{{ ''.__class__.__mro__[1].__subclasses__() }}",
                "{% for i in range(100000000) %}x{% endfor %}",
                "{% include '/etc/passwd' %}",
                "{{ messages[0].content.__init__.__globals__ }}",
                "{{ raise_exception('no') }}",
                "{{ 'x' * 1000000000 }}",
                "{{",
                "\ud800",
                "",
            )
        )
        (folder / "chat_template.jinja").write_text(template, errors="surrogatepass")
        return f"the template {template[:40]!r}"
    if kind == 5:
        edit(folder / "config.json", _attn_implementation="somebody/kernel", attn_implementation="somebody/kernel")
        return "an attention of somebody"
    if kind == 6:
        edit(folder / "config.json", quantization_config={"quant_method": rng.choice(("bitsandbytes", "gptq", "x"))})
        return "a quantisation"
    if kind == 7:
        edit(folder / "config.json", **{rng.choice(("vocab_size", "hidden_size", "num_hidden_layers")): 10**9})
        return "a size of 10**9"
    if kind == 8:
        edit(
            folder / "tokenizer_config.json",
            tokenizer_class=rng.choice(("Own", 5, "os.system")),
            auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
        )
        (folder / "own.py").write_text(OWN_CODE.format(executed=str(executed)))
        return "a tokenizer of its own"
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    file.unlink()
    file.mkdir()
    return f"{file.name} is a folder"


def model_plan(place: Place) -> Plan:
    rng = place.rng
    place.config()
    name = rng.choice(("model", "model", "adapter"))
    folder = place.from_world(name, name)
    if name == "adapter" and rng.random() < 0.4:
        base = place.from_world("model", "base")
        with_code(place, base)
        edit(
            folder / "adapter_config.json",
            base_model_name_or_path=str(base),
            auto_mapping={"base_model_class": "OwnModel", "parent_library": "own"},
        )
        what = "a base with code of its own"
    else:
        what = hostile_model(place, folder)
    words, outputs = using(place, name, rng)
    return Plan(words, f"{words[0]}: {name} with {what}", outputs=outputs)


def using(place: Place, name: str, rng: random.Random) -> tuple[list[str], tuple[str, ...]]:
    """A command that reads a model or a checkpoint, and what it may write."""
    kind = rng.randrange(3)
    if kind == 0:
        return ["generate", "--ckpt_path", name, "--prompt", "What is 3 + 4?", "--device", "cpu"], ("runs",)
    if kind == 1:
        flags = ["--overwrite"] * rng.randrange(2) + ["--merge"] * rng.randrange(2)
        return ["export", name, "out", *flags], ("runs", "out")
    return ["fit", "--config", "config.yaml", f"--model.policy.model_name={name}", *place.flags()], ("runs",)


def hostile_checkpoint(place: Place, file: Path) -> str:
    """Something wrong in a checkpoint; what it is."""
    rng = place.rng
    kind = rng.randrange(5)
    if kind == 0:
        file.write_bytes(damaged(file.read_bytes(), rng))
        return "damage"
    if kind == 1:
        content: Any = rng.choice((Pickled(place.root / "executed"), [], {}, {"state_dict": 5}, torch.ones(3)))
        with file.open("wb") as opened:
            torch.save(content, opened)
        return f"a {type(content).__name__}"
    content = torch.load(file, weights_only=True)
    if kind == 2:
        model = place.from_world("model", "claimed")
        with_code(place, model)
        claims = {"model_name": str(model), "trust_remote_code": True, "revision": "x", "attn_implementation": "a/b"}
        claims["model_kwargs"] = {"trust_remote_code": True}
        content["hyper_parameters"]["policy"].update(claims)
        what = "claims of a model with code"
    elif kind == 3:
        path = rng.choice([leaf for leaf in leaves(content["hyper_parameters"]) if leaf])
        put(content["hyper_parameters"], path, rng.choice((None, -1, "os.system", [1], 2**70, "\ud800", {})))
        what = f"odd hyper_parameters at {path}"
    else:
        parts = [key for key in content if key not in ("state_dict", "optimizer_states")]
        part = rng.choice(parts)
        found = [leaf for leaf in leaves(content[part]) if leaf] if isinstance(content[part], dict) else []
        if found:
            path = rng.choice(found)
            put(content[part], path, rng.choice((None, -1, "x", [1], 2**40, {}, torch.ones(2))))
        else:
            path = ()
            content[part] = rng.choice((None, -1, "x", [], {}))
        what = f"odd {part} at {path}"
    with file.open("wb") as opened:
        torch.save(content, opened)
    return what


def checkpoint_plan(place: Place) -> Plan:
    rng = place.rng
    place.resumable()
    file = place.work / "runs/r/version_0/checkpoints/last.ckpt"
    what = hostile_checkpoint(place, file)
    if rng.random() < 0.3:  # a config found beside a checkpoint
        beside = file.parents[1] / "config.yaml"
        beside.write_bytes(damaged(beside.read_bytes(), rng))
        what += ", and a damaged config beside"
    name = str(file.relative_to(place.work))
    if rng.random() < 0.4:
        words = ["fit", "--config", "config.yaml", "--ckpt_path", "last", *place.flags()]
        return Plan(words, f"resume: a checkpoint with {what}")
    if rng.random() < 0.3:
        words = ["validate", "--config", "config.yaml", "--ckpt_path", name, *place.flags()]
        return Plan(words, f"validate: a checkpoint with {what}")
    words, outputs = using(place, name, rng)
    if words[0] == "fit":
        words = ["doctor", *words[1:3], "--ckpt_path", name]
        return Plan(words, f"doctor: a checkpoint with {what}", codes=(0, 1), patience=20)
    return Plan(words, f"{words[0]}: a checkpoint with {what}", outputs=outputs)


# What lies in a run's folder, and guides ------------------------------------------------------------------------------


def run_plan(place: Place) -> Plan:
    rng = place.rng
    place.resumable()
    folder = place.work / "runs/r/version_0"
    names = ("metrics.csv", "samples.jsonl", "config.yaml", "hparams.yaml", "environment.json", "bad_steps.jsonl")
    file = folder / rng.choice(names)
    data = file.read_bytes() if file.exists() else b'{"step": 1}\n'
    if rng.random() < 0.4 and file.suffix == ".jsonl":
        rows = [json.dumps(hostile_value(rng)) + "\n" for _ in range(5)]
        data += "".join(rows).encode("utf-8", "surrogatepass")
    elif rng.random() < 0.2 and file.suffix == ".yaml":
        data = alias_bomb(rng).encode()
    else:
        data = damaged(data, rng)
    file.write_bytes(data)
    if rng.random() < 0.2:
        file.unlink()
        rng.choice((file.mkdir, lambda: file.symlink_to("/dev/zero"), lambda: os.mkfifo(file)))()
    target = rng.choice(("runs/r/version_0", "runs/r/version_0/", "runs", "last"))
    if rng.random() < 0.6:
        return Plan(["report", target], f"report: {file.name} is hostile", outputs=("runs", "report.html"))
    words = ["fit", "--config", "config.yaml", "--ckpt_path", "last", *place.flags()]
    return Plan(words, f"resume: {file.name} is hostile")


GUIDE: dict[str, Any] = {
    "agent": {"model_name": "gpt2", "max_new_tokens": 64, "temperature": 0.8, "system_prompt": "Be short."},
    "environment": {"type": "conversation", "scenarios": [{"id": "a", "context": "b", "user_responses": ["c"]}]},
    "training": {"algorithm": "grpo", "num_episodes": 10, "learning_rate": 1e-5, "num_generations": 4, "beta": 0.1},
}


def guide_plan(place: Place) -> Plan:
    rng = place.rng
    guide = json.loads(json.dumps(GUIDE))
    for _ in range(rng.randrange(1, 3)):
        put(guide, rng.choice([leaf for leaf in leaves(guide) if leaf]), hostile_value(rng))
    text = json.dumps(guide, indent=1).encode()
    if rng.random() < 0.5:
        text = rng.choice((damaged(text, rng), alias_bomb(rng).encode(), b"agent: " + b"[" * 5_000, b"\xff\xfe", b""))
    (place.work / "guide.yaml").write_bytes(text)
    output = rng.choice(([], ["-o", "converted.yaml"], ["-o", "guide.yaml"], ["-o", "nowhere/c.yaml"]))
    # what is not carried over is named as it stands: a text of the guide is no secret
    return Plan(["convert", "guide.yaml", *output], f"convert: {text[:50]!r}", outputs=("converted.yaml", "nowhere"))


# Outputs over inputs --------------------------------------------------------------------------------------------------


def overwriting_plan(place: Place) -> Plan:
    """The user's own files are named as outputs: each stays as it was."""
    rng = place.rng
    place.config()
    samples = place.work / "samples.jsonl"
    samples.write_text((place.work / "rows.jsonl").read_text())
    for name in ("predictions.jsonl", "metrics.csv", "last.ckpt"):
        (place.work / name).write_text((place.work / "rows.jsonl").read_text())
    place.from_world("model", "model")
    fit = ["fit", "--config", "config.yaml", "--trainer.logger=false"]
    predict = ["predict", "--config", "config.yaml"]
    logs = "lightning_logs"
    choices: tuple[tuple[list[str], tuple[str, ...]], ...] = (
        ([*fit, "--data.train=samples.jsonl"], (logs, "checkpoints")),
        ([*fit, "--data.train=samples.jsonl", "--trainer.default_root_dir=."], (logs, "checkpoints")),
        ([*predict, "--predictions.path=rows.jsonl"], ("runs",)),
        ([*predict, "--predictions.path=./../work/rows.jsonl"], ("runs",)),
        ([*predict, "--data.predict=predictions.jsonl", "--predictions.path=predictions.jsonl"], ("runs",)),
        ([*predict, "--predictions.path=config.yaml"], ("runs",)),
        ([*predict, "--predictions.path=memory::rows.jsonl"], ("runs", "memory::rows.jsonl")),
        ([*predict, "--predictions.path=file://rows.jsonl"], ("runs", "file:")),
        (["export", "model", "model", "--overwrite"], ()),
        (["export", "model", "model/out", "--overwrite"], ("model/out",)),
        (["export", "model", ".", "--overwrite"], ()),
        (["export", "model/", "./model", "--overwrite"], ()),
        (["export", "model", "rows.jsonl"], ()),
        (["report", "runs", "-o", "rows.jsonl"], ()),
        (["report", "runs", "-o", "config.yaml"], ()),
        (["convert", "config.yaml", "-o", "config.yaml"], ()),
    )
    words, outputs = rng.choice(choices)
    return Plan(words, f"outputs over inputs: {' '.join(words)[:100]}", outputs=outputs)


PLANS = (
    (data_plan, 6),
    (config_plan, 6),
    (model_plan, 4),
    (checkpoint_plan, 4),
    (run_plan, 4),
    (guide_plan, 2),
    (overwriting_plan, 2),
)


def plan(place: Place) -> Plan:
    makers, weights = zip(*PLANS, strict=True)
    return place.rng.choices(makers, weights)[0](place)
