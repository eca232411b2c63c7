"""Streams: shuffled by buffers, divided among ranks, resumed exactly, begun again at their end."""

import pytest
import torch
from lightning.pytorch import Callback
from module_runs import make_module, make_trainer

from stateset_lightning import ScenarioDataModule
from stateset_lightning.data import content, stream
from stateset_lightning.data.order import Curriculum
from stateset_lightning.data.sources import Source
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.ranks import Ranks


class Numbers:
    """A stream that knows how far it was read, as torchdata's and those of `datasets`."""

    def __init__(self, size):
        self.size = size
        self.at = 0

    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            yield {"prompt": f"What is {self.at - 1}?", "target": self.at - 1}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def of_datasets(size):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"What is {i}?", "target": i} for i in range(size)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)


STREAMS = {"own": Numbers, "of datasets": of_datasets}
KINDS = pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(stream, "BUFFER", 12)


def module(spec, tokenizer, rank=0, ranks=1, **options):
    data = ScenarioDataModule(spec, batch_size=4 // ranks, tokenizer=tokenizer, seed=5, **options)
    data._ranks = lambda: Ranks(rank, ranks)
    data.setup("fit")
    return data


def serve(data, count):
    """Targets of each batch, and whether prompts are those of the rows."""
    loader, shown = data.train_dataloader(), []
    served = iter(loader)
    while len(shown) < count:
        if (batch := next(served, None)) is None:
            served = iter(loader)
            continue
        shown.append([s.target for s in batch.scenarios])
        texts = [data.tokenizer.decode(tokens) for tokens in batch.prompt_tokens]
        assert all(f"What is {target}?" in text for target, text in zip(shown[-1], texts, strict=True))
    return shown


@KINDS
def test_each_buffer_is_served_once_in_an_order_of_its_own_and_the_stream_begins_again(tokenizer, make):
    batches = serve(module(make(30), tokenizer), 10)
    rows = [row for batch in batches for row in batch]
    buffers = [rows[start : start + 12] for start in range(0, 36, 12)]
    assert [sorted(buffer) for buffer in buffers] == [
        list(range(12)),
        list(range(12, 24)),
        [*range(6), *range(24, 30)],
    ]
    orders = [[row % 12 for row in buffer] for buffer in buffers[:2]]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(12))
    in_order = serve(module(make(30), tokenizer, shuffle=False), 4)
    assert in_order == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@KINDS
def test_two_ranks_divide_what_one_serves(tokenizer, make):
    whole = serve(module(make(30), tokenizer), 9)
    parts = [serve(module(make(30), tokenizer, rank, 2), 9) for rank in range(2)]
    assert [[a for pair in zip(*both, strict=True) for a in pair] for both in zip(*parts, strict=True)] == whole


@KINDS
@pytest.mark.parametrize("done", range(1, 10))
def test_a_run_resumes_exactly_wherever_it_was(tokenizer, make, done):
    whole = serve(module(make(30), tokenizer), 12)
    data = module(make(30), tokenizer)
    assert serve(data, done) == whole[:done]
    data._train_loader.next_episode()  # as sampling ahead does
    state = data.state_dict()
    again = module(make(30), tokenizer)
    loader = again.train_dataloader()
    loader.load_state_dict(state["train"])
    again._scenarios["train"].stream.load_state_dict(state["stream"])
    again.train_dataloader = lambda: loader
    assert serve(again, 12 - done) == whole[done:]


def test_replacements_come_from_the_buffer_that_is_served(tokenizer):
    data = module(Numbers(1000), tokenizer)
    serve(data, 8)
    batch = data._train_loader.next_episode()
    other = data.replacements(batch, [0, 1], 1)
    assert all(24 <= s.target < 36 for s in other.scenarios)
    assert [s.target for s in other.scenarios] != [s.target for s in batch.scenarios[:2]]


REFUSED = {
    "a generator": (
        lambda: (row for row in [{"prompt": "a"}]),
        {},
        "a generator has no state_dict and load_state_dict",
    ),
    "an empty one": (lambda: Numbers(0), {}, "data.train has no rows"),
    "a curriculum": (lambda: Numbers(9), {"curriculum": Curriculum()}, "need all rows, and data.train is a stream"),
    "rows held out": (lambda: Numbers(9), {"validation_fraction": 0.1}, "need all rows, and data.train is a stream"),
    "sources": (lambda: [Source(rows=Numbers(9)), Source(rows=[{"prompt": "a"}])], {}, "cannot be mixed with other"),
    "drop": (lambda: Numbers(9), {"overlong_prompts": "drop"}, "set it to truncate_left"),
}


@pytest.mark.parametrize(("make", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_stream_cannot_do_is_refused(tokenizer, make, options, said):
    with pytest.raises((ConfigError, DataError), match=said):
        module(make(), tokenizer, **options)


def test_a_stream_has_no_end_to_validate_on(tokenizer):
    data = ScenarioDataModule([{"prompt": "a"}], validation=Numbers(9), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"data.validation is a stream, .* give a list of its rows, or a file"):
        data.setup("fit")


@pytest.mark.parametrize("kind", ["stream", "large file"])
def test_a_fit_goes_on_from_its_checkpoint_as_if_it_had_not_ended(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(content, "LARGE_ROWS", 10)
    (tmp_path / "a.csv").write_text("prompt,target\n" + "".join(f"What is {i}?,{i}\n" for i in range(30)))

    def fit(folder, steps, checkpoint=None):
        served = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                served.append([s.target for s in batch.scenarios])

        trainer = make_trainer(tmp_path / folder, max_steps=steps, callbacks=[Watch()])
        data = ScenarioDataModule(Numbers(30) if kind == "stream" else str(tmp_path / "a.csv"), batch_size=4)
        run = make_module()
        trainer.fit(run, datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / folder / "end.ckpt")
        return served, {name: p.detach().clone() for name, p in run.named_parameters()}

    whole, weights = fit("whole", 5)
    first, _ = fit("first", 3)
    rest, resumed = fit("rest", 5, tmp_path / "first/end.ckpt")
    assert first + rest == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@KINDS
def test_another_run_on_the_same_stream_begins_where_the_first_did(tokenizer, make):
    rows = make(30)
    assert serve(module(rows, tokenizer), 5) == serve(module(rows, tokenizer), 5)
