"""The live view: what it draws at any width, what it never obeys, and what it leaves behind."""

import io

import pytest
from lightning.pytorch import Callback
from module_runs import fit, make_data
from rich.console import Console

from stateset_lightning.callbacks import ConsoleProgress, LiveView
from stateset_lightning.callbacks.live_view import MAX_POINTS, Curve, View, one_line, share_solved, sparkline
from stateset_lightning.records import CompletionRecord

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


def record(completion="42", reward=1.0, **rewards):
    return CompletionRecord("1", None, "What is 6 * 7?", completion, reward, rewards, "stop", 3)


def drawn(view, width, **options):
    console = Console(file=io.StringIO(), width=width, color_system=None, **options)
    console.print(view)
    return console.file.getvalue()


def curves(**values):
    made = {}
    for label, numbers in values.items():
        made[label.replace("_per_s", "/s")] = curve = Curve()
        for number in numbers:
            curve.add(number)
    return made


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0.5, 0.5], 8, "▁▁"),
        ([0, 0, 7, 7], 2, "▁█"),  # means of neighbours
        ([1, 2, 3], 1, "▁"),
        ([], 5, ""),
        ([-1, 1], 9, "▁█"),
    ],
)
def test_a_sparkline_runs_from_lowest_to_highest(values, width, line):
    assert sparkline(values, width) == line


def test_a_curve_keeps_a_whole_run_in_bounded_memory():
    curve = Curve()
    for value in range(4 * MAX_POINTS):
        curve.add(float(value))
    assert len(curve.values) < MAX_POINTS
    assert curve.last == 4 * MAX_POINTS - 1
    assert curve.values[0] == sum(range(curve.stride)) / curve.stride
    assert curve.values == sorted(curve.values)
    again = Curve(*curve.state())
    for each in (curve, again):
        each.add(0.0)
    assert again.state() == curve.state()


def test_the_share_solved_leaves_out_what_has_no_score():
    records = [record(reward=1.0, right=0.0), record(reward=0.2, right=1.0), record(reward=None, right=None)]
    assert share_solved(records, 1.0, None) == 0.5
    assert share_solved(records, 0.1, None) == 1.0
    assert share_solved(records[:1], 1.0, "right") == 0.0
    assert share_solved(records[2:], 1.0, None) is None


def test_a_view_has_a_row_for_each_metric_there_is():
    shown = curves(reward=[0.25, 0.5], solved=[0.5], tokens=[3.5], tokens_per_s=[12345.6])
    lines = drawn(
        View("step 2/9  1:05 left", shown, "validation after step 2: reward 0.500", record()), 60
    ).splitlines()
    assert [line.rstrip() for line in lines] == [
        "step 2/9  1:05 left",
        "reward     0.500 ▁█",
        "solved       50% ▁",
        "tokens       3.5 ▁",
        "tokens/s  12,346 ▁",
        "validation after step 2: reward 0.500",
        "prompt      What is 6 * 7?",
        "completion  42",
        "            reward 1.000, 3 tokens, stop",
    ]


@pytest.mark.parametrize("width", [1, 2, 5, 10, 19, 20, 21, 40, 300])
def test_no_line_is_wider_than_the_terminal(width):
    shown = curves(reward=[i / 7 for i in range(200)], solved=[0.5] * 200, KL=[1e9])
    lines = drawn(View("step 1,000,000/2,000,000  1000:05 left", shown, "", record("word " * 100)), width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) == 7  # one each: nothing wraps


def test_text_of_a_model_is_neither_markup_nor_an_order_to_the_terminal():
    text = "[bold red]hi[/] [/nope] [link=file:///etc]x[/link] :smile: \x1b[2J\x1b]0;title\x07\r\x00 \u202eback\nnext"
    (line,) = drawn(one_line(text), 200).splitlines()
    assert line == "[bold red]hi[/] [/nope] [link=file:///etc]x[/link] :smile: ·[2J·]0;title··· ·back⏎next"


def test_a_terminal_without_unicode_gets_plain_text():
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding="ascii"), width=40, color_system=None)
    console.print(View("step 1", curves(reward=[0.0, 1.0]), "", record("\u56db\u5341\u4e8c\n")))
    console.file.flush()
    assert b"reward   1.000 _#" in written.getvalue()
    assert b"completion  ????" in written.getvalue()


def terminal(view):
    view.console = Console(file=io.StringIO(), force_terminal=True, width=70, height=30, color_system=None)
    return view


def test_on_a_terminal_it_takes_the_place_of_the_lines(tmp_path, capsys):
    view = terminal(LiveView(sample_seconds=1e-9))
    lines = ConsoleProgress(every_n_steps=1)
    fit(tmp_path, callbacks=[lines, view], max_steps=3, limit_val_batches=1, val_check_interval=2)
    shown = view.console.file.getvalue()
    last = shown[shown.rindex("step 3/3") :]
    for text in (
        "reward ",
        "solved ",
        "tokens ",
        "tokens/s ",
        "validation after step 2: reward",
        "prompt      What is",
        "completion  ",
    ):
        assert text in last, text
    assert "KL" not in last  # there is no reference
    assert [len(view.curves[label].values) for label in ("reward", "solved", "tokens", "KL")] == [3, 3, 3, 0]
    assert "step 1/3" not in capsys.readouterr().out
    assert not lines.prints
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1


def test_without_a_terminal_it_prints_lines_and_only_once(tmp_path, capsys):
    fit(tmp_path / "alone", callbacks=[LiveView(every_n_steps=1)], max_steps=2)
    said = capsys.readouterr().out
    assert [line[:8] for line in said.splitlines() if line.startswith("step ")] == ["step 1/2", "step 2/2"]
    assert "\x1b" not in said
    fit(tmp_path / "both", callbacks=[LiveView(every_n_steps=1), ConsoleProgress(every_n_steps=1)], max_steps=2)
    said = capsys.readouterr().out
    assert [line[:8] for line in said.splitlines() if line.startswith("step ")] == ["step 1/2", "step 2/2"]


def test_the_progress_bar_gives_way(tmp_path, capsys):
    view = terminal(LiveView())
    trainer = fit(tmp_path, callbacks=[view], max_steps=1, enable_progress_bar=True)
    assert trainer.progress_bar_callback is not None
    assert trainer.progress_bar_callback.is_disabled
    assert "Epoch" not in capsys.readouterr().out


@pytest.mark.parametrize("raised", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_the_cursor_comes_back_whatever_ends_the_run(tmp_path, raised):
    class Ends(Callback):
        def on_train_batch_end(self, trainer, *args):
            raise raised

    view = terminal(LiveView())
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(tmp_path, callbacks=[view, Ends()], max_steps=2)
    shown = view.console.file.getvalue()
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    assert view._live is None


def test_a_resumed_run_goes_on_with_its_curves(tmp_path):
    first = terminal(LiveView())
    trainer = fit(tmp_path, callbacks=[first], max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    second = terminal(LiveView())
    fit(tmp_path, callbacks=[second], max_steps=4, ckpt_path=tmp_path / "two.ckpt")
    assert second.curves["reward"].values[:2] == first.curves["reward"].values
    assert len(second.curves["reward"].values) == 4


def test_it_changes_nothing_of_the_run(tmp_path):
    plain = fit(tmp_path, max_steps=2, data=make_data())
    watched = fit(tmp_path, max_steps=2, data=make_data(), callbacks=[terminal(LiveView(sample_seconds=1e-9))])
    for (name, mine), (_, theirs) in zip(
        plain.lightning_module.state_dict().items(), watched.lightning_module.state_dict().items(), strict=True
    ):
        assert mine.equal(theirs), name
