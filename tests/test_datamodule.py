"""ScenarioDataModule under a real Trainer and a real parser."""

import logging

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stateset_lightning.data.order import Curriculum
from stateset_lightning.data.sources import Source
from stateset_lightning.datamodule import ScenarioDataModule
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.types import PromptBatch, Turn

ROWS = [{"prompt": f"p{i}"} for i in range(5)]


def make_tokenizer():
    """One token per word; every word is <unk>, without a chat template."""
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def make(train=ROWS, **options):
    return ScenarioDataModule(train, **{"batch_size": 2, "seed": 3, "tokenizer": make_tokenizer(), **options})


class Recorder(LightningModule):
    """Trains one weight, and records the batches it gets."""

    def __init__(self, schedule=False):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.schedule = schedule
        self.seen = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, PromptBatch)
        self.seen.append((tuple(s.id for s in batch.scenarios), batch.episode_index, batch.micro_step))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch.positions

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        if not self.schedule:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=int(total)),
        }


def trainer(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(callbacks),
    }
    return Trainer(accelerator="cpu", use_distributed_sampler=False, callbacks=list(callbacks), **{**quiet, **options})


def fit(folder=None, ckpt_path=None, schedule=False, data=None, every=None, **options):
    module = Recorder(schedule)
    keep = {"save_top_k": -1, "filename": "{step}", **(every or {"every_n_train_steps": 1})}
    callbacks = [ModelCheckpoint(folder, **keep)] if folder else []
    run = trainer(*callbacks, **options)
    run.fit(module, data or make(num_iterations=2), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module.seen


def test_epochs_advance_and_micro_steps_repeat_their_prompts():
    seen = fit(max_epochs=2)
    assert [batch[1:] for batch in seen] == [(e, m) for e in range(6) for m in range(2)]
    assert [batch[0] for batch in seen[::2]] == [batch[0] for batch in seen[1::2]]
    first, second = [i for b in seen[:6:2] for i in b[0]], [i for b in seen[6::2] for i in b[0]]
    assert set(first) == set(second) == {f"train:{i}" for i in range(1, 6)}
    assert first != second


AT_EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("stop", "schedule", "every"),
    [
        ({"max_steps": 15, "max_epochs": -1}, False, None),
        ({"max_epochs": 3}, False, None),
        ({"max_epochs": 3}, True, None),  # Lightning drops the loader's state: the data module restores it
        ({"max_steps": 15, "max_epochs": -1}, False, AT_EPOCH_END),  # Lightning's epoch number skips one
        ({"max_epochs": 3}, True, AT_EPOCH_END),
        ({"max_epochs": 3, "limit_train_batches": 4}, False, None),
        ({"max_epochs": 3, "overfit_batches": 2}, False, None),
    ],
)
def test_a_run_resumed_from_each_of_its_checkpoints_sees_the_same_batches(tmp_path, stop, schedule, every):
    full = fit(tmp_path, schedule=schedule, every=every, **stop)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        step = torch.load(checkpoint, weights_only=True)["global_step"]
        assert fit(ckpt_path=checkpoint, schedule=schedule, **stop) == full[step:], checkpoint.name


def test_overfitting_serves_the_same_prompts_each_epoch():
    seen = fit(max_epochs=3, overfit_batches=2)
    assert len({batch[0] for batch in seen}) == 1
    assert [batch[1:] for batch in seen] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_resuming_with_another_batch_size_is_refused(tmp_path):
    fit(tmp_path, max_steps=2, max_epochs=-1)
    with pytest.raises(ConfigError, match=r"data.batch_size is 3, but 2 in the checkpoint"):
        fit(ckpt_path=tmp_path / "step=1.ckpt", data=make(num_iterations=2, batch_size=3), max_steps=4, max_epochs=-1)


def test_resuming_with_other_prompts_of_the_same_number_is_refused(tmp_path):
    fit(tmp_path, max_steps=2, max_epochs=-1)
    others = [{**row, "prompt": row["prompt"] + "!"} for row in ROWS]
    with pytest.raises(ConfigError, match=r"data.train.* in the checkpoint"):
        fit(ckpt_path=tmp_path / "step=1.ckpt", data=make(num_iterations=2, train=others), max_steps=4, max_epochs=-1)


def test_evaluating_a_checkpoint_does_not_decide_where_a_fit_starts(tmp_path):
    fresh = fit(tmp_path, max_steps=3, max_epochs=-1)
    data = make(num_iterations=2, validation=ROWS[:3])
    trainer().validate(Recorder(), data, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True, verbose=False)
    assert fit(data=data, max_steps=3, max_epochs=-1) == fresh


def test_each_stage_serves_its_split():
    data = make(validation=ROWS[:3], test=ROWS[:4], predict=ROWS, eval_batch_size=4)
    for stage, size in (("validate", 3), ("test", 4), ("predict", 5)):
        module = Recorder()
        getattr(trainer(), stage)(module, data)
        assert module.evaluated == list(range(size))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("fit", "data.train is not given"),
        ("validate", "data.validation is not given; set it or data.validation_fraction"),
        ("test", "data.test is not given"),
        ("predict", "data.predict is not given"),
    ],
)
def test_a_stage_without_its_split_names_the_key(stage, message):
    other = {"predict" if stage != "predict" else "test": ROWS}
    with pytest.raises(ConfigError, match=message):
        getattr(trainer(), stage)(Recorder(), make(train=None, **other))


def test_a_missing_split_is_named_without_a_trainer_too():
    data = make()
    data.setup("fit")
    with pytest.raises(ConfigError, match=r"data.test is not given"):
        data.test_dataloader()


def test_only_the_splits_of_the_stage_are_read_and_only_once(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text('{"prompt": "a"}')
    data = make(str(train), test=str(tmp_path / "absent.jsonl"))
    data.setup("fit")
    train.unlink()
    data.setup("fit")
    assert data.num_scenarios == {"train": 1}
    with pytest.raises(DataError, match=r"absent.jsonl: there is no such file"):
        data.setup("test")


def test_sizes_are_known_after_setup():
    data = make(num_iterations=2, steps_per_episode=3, validation=ROWS[:2])
    data.setup("fit")
    assert (data.episodes_per_epoch, data.micro_steps_per_epoch) == (3, 18)
    assert data.num_scenarios == {"train": 5, "validation": 2}
    assert len(data.train_dataloader()) == 18


def test_a_fraction_is_held_out_for_fit_and_for_validate_alike():
    fitted, validated = make(validation_fraction=0.4), make(validation_fraction=0.4)
    fitted.setup("fit")
    validated.setup("validate")
    assert fitted.num_scenarios == {"train": 3, "validation": 2}
    held, again = ([s.id for batch in data.val_dataloader() for s in batch.scenarios] for data in (fitted, validated))
    assert held == again
    assert not set(held) & {s.id for batch in fitted.train_dataloader() for s in batch.scenarios}


def test_the_tokenizer_is_the_modules_unless_given():
    module = Recorder()
    data = make(tokenizer=None)
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        trainer(max_steps=1).fit(module, data)
    module.tokenizer = make_tokenizer()
    trainer(max_steps=1).fit(module, data)
    assert len(module.seen) == 1


def test_batches_of_every_split_carry_the_conversations_that_were_encoded():
    rows = [{"prompt": "a", "context": "Be kind"}, {"messages": [{"role": "user", "content": "b"}]}]
    data = make(rows, validation=rows, system_prompt="You help", shuffle=False)
    data.setup("fit")
    wanted = [
        [Turn("system", "You help\n\nBe kind"), Turn("user", "a")],
        [Turn("system", "You help"), Turn("user", "b")],
    ]
    loader = data.train_dataloader()
    train, validation = next(iter(loader)), next(iter(data.val_dataloader()))
    assert train.conversations == validation.conversations == wanted
    assert data.replacements(train, [0, 1], 1).conversations == wanted[::-1]


def test_dropped_prompts_are_counted_and_announced(caplog):
    data = make([{"prompt": "a"}, {"prompt": "a b c"}], max_prompt_tokens=2, overlong_prompts="drop")
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        data.setup("fit")
        data.setup("fit")
        data.train_dataloader()
    assert (data.dropped, data.truncated, data.num_scenarios) == ({"train": 1}, {"train": 0}, {"train": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "data.train: 2 scenarios from data.train item 1",
        "the tokenizer has no chat template: turns are joined by blank lines",
        "data.train: 1 of 2 prompts have more than data.max_prompt_tokens=2 tokens and are dropped",
        "data.train: 1 prompts make 1 episodes of 2; the last is filled with 1 from the start",
    ]


def test_weighted_sources_are_mixed_and_part_of_the_state():
    sources = [
        Source(rows=ROWS, weight=3.0, rewards=["exact"], name="a"),
        Source(rows=[{"prompt": "x"}] * 3, weight=1.0, name="b"),
    ]
    data = make(sources)
    data.setup("fit")
    loader = data.train_dataloader()
    epoch = [s for batch in loader for s in batch.scenarios]
    assert [sum(s.id.startswith(name) for s in epoch) for name in "ab"] == [6, 2]
    assert {s.rewards for s in epoch if s.id.startswith("a")} == {("exact",)}
    assert loader.state_dict()["sources"] == "5*3.0 3*1.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0 must be below 1"),
        ({"validation_fraction": 0.5, "validation": ROWS}, "are both given; leave one of them out"),
        ({"validation_fraction": 0.5, "train": None}, "is a fraction of data.train, which is not given"),
        ({"overlong_prompts": "cut"}, "data.overlong_prompts='cut' must be one of error, drop, truncate_left"),
        ({"tokenizer": "gpt2"}, "data.tokenizer='gpt2' must be a tokenizer object"),
    ],
)
def test_options_that_cannot_be_honoured(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def parser():
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_class_arguments(ScenarioDataModule, "data")
    return made


@pytest.mark.parametrize(
    ("train", "prompts"),
    [
        ("{path}", ["a"]),
        ("[{prompt: b, target: 3}, {prompt: c, id: 7}]", ["b", "c"]),
        ("[{context: Be brief, user_responses: [d, e]}]", ["d", "e"]),
        ("[{path: {path}, weight: 2.0, rewards: [exact]}, {rows: [{prompt: f}], weight: 1}]", ["a", "f"]),
    ],
)
def test_yaml_values_of_train_parse_and_print_back(tmp_path, train, prompts):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}')
    config = parser().parse_args([f"--data.train={train.replace('{path}', str(path))}"])
    printed = parser().dump(config)
    assert parser().dump(parser().parse_string(printed)) == printed
    data = parser().instantiate(parser().parse_string(printed)).data
    data.tokenizer = make_tokenizer()
    data.setup("fit")
    assert [scenario.prompt for scenario in data._scenarios["train"].scenarios] == prompts


@pytest.mark.parametrize(
    "argument",
    ["batch_size=0", "eval_batch_size=0", "num_iterations=0", "max_prompt_tokens=0", "validation_fraction=1"],
)
def test_bounds_hold_at_the_command_line(argument):
    with pytest.raises(jsonargparse.ArgumentError, match="should be"):
        parser().parse_args([f"--data.{argument}"])


def test_a_curriculum_is_part_of_the_state_and_of_what_must_be_equal():
    def set_up(**options):
        data = make(**options)
        data.trainer = trainer()
        data.trainer.state.fn = "fit"
        data.setup("fit")
        return data

    data = set_up(curriculum={"floor": 0.2})
    assert data.curriculum == Curriculum(floor=0.2)
    data.train_dataloader()
    data.report_rewards(0, [0, 3], torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    state = data.state_dict()
    assert state["solve_rates"]["waiting"].tolist() == [[0, 0, 2, 2], [0, 3, 1, 2]]
    resumed = set_up(curriculum=Curriculum(floor=0.2))
    resumed.load_state_dict(state)
    resumed.train_dataloader()
    assert torch.equal(resumed.state_dict()["solve_rates"]["waiting"], state["solve_rates"]["waiting"])
    for other in (None, Curriculum(floor=0.3)):
        changed = set_up(curriculum=other)
        changed.load_state_dict(state)
        with pytest.raises(
            ConfigError, match=r"data.curriculum is .*, but 'floor=0.2 decay=0.5 solved_at=1.0' in the checkpoint"
        ):
            changed.train_dataloader()


def test_a_curriculum_contradicts_a_fixed_order_and_repeated_batches():
    with pytest.raises(ConfigError, match=r"data\.shuffle=False .* leave one of them out"):
        make(curriculum=Curriculum(), shuffle=False)
    with pytest.raises(ConfigError, match=r"trainer\.overfit_batches=1 contradicts data\.curriculum"):
        fit(data=make(curriculum=Curriculum()), max_steps=1, overfit_batches=1)


def test_a_curriculum_is_parsed_from_text():
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(ScenarioDataModule, "data")
    config = parser.parse_args(["--data=ScenarioDataModule", "--data.train=x.jsonl", "--data.curriculum.floor=0.3"])
    assert parser.instantiate(config).data.curriculum.floor == 0.3
