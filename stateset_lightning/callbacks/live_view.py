"""A live view of a run in the terminal: curves, the newest numbers, a completion now and then. No part of the run
depends on it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from annotated_types import Ge, Gt
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stateset_lightning.bounds import check_bounds
from stateset_lightning.callbacks.console import ConsoleProgress, time_left
from stateset_lightning.records import CompletionRecord
from stateset_lightning.run_checks import optimizer_steps_of_run

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"
MAX_POINTS = 512
"""Of a curve in memory; a longer one is halved."""

ROWS = {
    "reward": ("train/reward", ".3f"),
    "solved": ("solved", ".0%"),
    "tokens": ("completion/mean_tokens", ".1f"),
    "KL": ("policy/kl", ".4f"),
    "tokens/s": ("work/tokens_per_s", ",.0f"),
}
"""Label -> metric of an episode, and how it is written. A metric that a run does not have (KL without a reference) has
no row.
"""


class LiveView(ConsoleProgress):
    """Draws the run in the terminal: reward, share of completions solved, length, KL and tokens per second, each with
    its curve.

    It takes the place of the progress bar and of `ConsoleProgress`. Where standard output is no terminal, it prints
    lines as they do.

    Args:
        every_n_steps: Optimizer steps between lines, where there is no terminal.
        sample_seconds: Seconds for which a completion is shown before another one takes its place.
        refresh_per_second: How often the view is drawn anew.
    """

    def __init__(
        self,
        every_n_steps: Annotated[int, Ge(1)] = 20,
        sample_seconds: Annotated[float, Gt(0)] = 10.0,
        refresh_per_second: Annotated[float, Gt(0)] = 4.0,
    ) -> None:
        given = {
            "every_n_steps": every_n_steps,
            "sample_seconds": sample_seconds,
            "refresh_per_second": refresh_per_second,
        }
        check_bounds("LiveView", LiveView.__init__, given)
        super().__init__(every_n_steps)
        self.sample_seconds = sample_seconds
        self.refresh_per_second = refresh_per_second
        self.curves: dict[str, Curve] = {label: Curve() for label in ROWS}
        self.console = Console()
        self._live: Live | None = None
        self._trainer: Trainer | None = None
        self._validated = ""
        self._sample: CompletionRecord | None = None
        self._sampled_at = float("-inf")

    # When it draws
    # -------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        others = [c for c in trainer.callbacks if isinstance(c, ConsoleProgress) and c is not self]  # type: ignore[attr-defined]
        draws = self.console.is_terminal and trainer.is_global_zero
        self.prints = not draws and not any(other.prints for other in others)
        if draws:
            for other in others:
                other.prints = False
            if trainer.progress_bar_callback is not None:  # two of them would draw over each other
                trainer.progress_bar_callback.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.console.is_terminal or not trainer.is_global_zero:
            return
        self._trainer = trainer
        # Redirected, so that what others print comes above the view instead of into it.
        self._live = Live(get_renderable=self.view, console=self.console, refresh_per_second=self.refresh_per_second)
        self._live.start()

    def on_episode_end(self, episode: int, metrics: Mapping[str, float]) -> None:
        if self._trainer is None:
            return
        module: Any = self._trainer.lightning_module
        values = {
            **metrics,
            "solved": share_solved(module.last_records, module.evaluation.solved_at, module.evaluation.solved_by),
        }
        for label, (name, _) in ROWS.items():
            if (value := values.get(name)) is not None:
                self.curves[label].add(value)
        if time.monotonic() - self._sampled_at >= self.sample_seconds and module.last_records:
            # Another one each time, by the episode's number: nothing here may draw random numbers.
            self._sample = module.last_records[episode % len(module.last_records)]
            self._sampled_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._live is not None and "val/reward" in trainer.callback_metrics:
            metrics = trainer.callback_metrics
            parts = [
                f"{name} {float(metrics[f'val/{name}']):.3f}"
                for name in ("reward", "solved")
                if f"val/{name}" in metrics
            ]
            self._validated = f"validation after step {trainer.global_step}: {', '.join(parts)}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        """Leaves the last view on the screen, and the cursor as it was."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        return {"curves": {label: curve.state() for label, curve in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {label: Curve(*state_dict["curves"].get(label, ())) for label in ROWS}

    # What it draws
    # -------------------------------------------------------------------------------------------------------------

    def view(self) -> RenderableType:
        """The run as it is now."""
        return View(self._headline(), self.curves, self._validated, self._sample)

    def _headline(self) -> str:
        if (trainer := self._trainer) is None:
            return ""
        step, total = trainer.global_step, optimizer_steps_of_run(trainer)
        left = time_left(self._started, step - self._first_step, total and total - step)
        return f"step {step:,}" + (f"/{total:,}" if total else "") + (f"  {left} left" if left else "")


class View:
    """One drawing, made for the width that the terminal has at that moment."""

    def __init__(
        self, headline: str, curves: Mapping[str, "Curve"], validated: str, sample: CompletionRecord | None
    ) -> None:
        self.headline = headline
        self.curves = curves
        self.validated = validated
        self.sample = sample

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = options.ascii_only  # writing anything else to such a terminal would raise
        blocks = ASCII_BLOCKS if plain else BLOCKS
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right", min_width=7)
        table.add_column(no_wrap=True)
        for label, curve in self.curves.items():
            if curve.values:
                number = format(curve.last, ROWS[label][1])
                table.add_row(
                    label,
                    Text(number, "bold"),
                    Text(sparkline(curve.values, max(options.max_width - 20, 1), blocks), "cyan"),
                )
        parts: list[RenderableType] = [one_line(self.headline, "bold"), table]
        if self.validated:
            parts.append(one_line(self.validated))
        if self.sample is not None:
            reward = "no score" if self.sample.reward is None else f"reward {self.sample.reward:.3f}"
            parts.append(one_line(f"prompt      {self.sample.prompt}", "dim", plain))
            parts.append(one_line(f"completion  {self.sample.completion}", "", plain))
            parts.append(
                one_line(f"            {reward}, {self.sample.num_tokens} tokens, {self.sample.finish_reason}", "dim")
            )
        yield Group(*parts)


class Curve:
    """Values of a run from its start, each a mean over `stride` episodes; a list that is full is halved.

    Args:
        values: So far.
        stride: Episodes of each.
        last: The newest value.
        rest: Values that do not make up a whole stride yet.
    """

    def __init__(
        self, values: Sequence[float] = (), stride: int = 1, last: float = 0.0, rest: Sequence[float] = ()
    ) -> None:
        self.values = list(values)
        self.stride = stride
        self.last = last
        self.rest = list(rest)

    def add(self, value: float) -> None:
        self.last = value
        self.rest.append(value)
        if len(self.rest) == self.stride:
            self.values.append(sum(self.rest) / self.stride)
            self.rest = []
        if len(self.values) == MAX_POINTS:
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self.stride *= 2

    def state(self) -> list[Any]:
        return [self.values, self.stride, self.last, self.rest]


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """The values from lowest to highest as blocks, in at most `width` characters; means where there are more values."""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high == low:
        return blocks[0] * count
    return "".join(blocks[min(int((mean - low) / (high - low) * len(blocks)), len(blocks) - 1)] for mean in means)


def share_solved(records: Sequence[CompletionRecord], solved_at: float, solved_by: str | None) -> float | None:
    """Share of scored completions with `solved_at` or more of the reward `solved_by` (None: the total); None if none is
    scored.
    """
    scores = [record.reward if solved_by is None else record.rewards[solved_by] for record in records]
    scored = [score for score in scores if score is not None]
    return sum(score >= solved_at - 1e-9 for score in scored) / len(scored) if scored else None


def one_line(text: str, style: str = "", ascii_only: bool = False) -> Text:
    """Text of a model on one line: no markup, and nothing that a terminal would obey; cut at the terminal's edge."""
    shown = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)
    if ascii_only:
        shown = shown.encode("ascii", "replace").decode()
    return Text(shown, style, no_wrap=True, overflow="ellipsis")
