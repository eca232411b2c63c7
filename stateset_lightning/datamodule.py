"""ScenarioDataModule: files of scenarios in, prompt batches out."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from stateset_lightning.data.loader import EpisodeLoader, EvaluationLoader, Prompts, Split
from stateset_lightning.data.order import Curriculum, EpochOrder, SolveRates
from stateset_lightning.data.prompts import EncodedPrompts, OverlongPolicy, PromptEncoder, first_row
from stateset_lightning.data.ragged import RaggedTokens
from stateset_lightning.data.scenario_set import ScenarioSet, ServedScenarios, hold_out
from stateset_lightning.data.shapes import FinalTurn, Format, RowOptions
from stateset_lightning.data.sources import Row, Source, check_options, read_split
from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.ranks import Ranks
from stateset_lightning.seeding import run_seed
from stateset_lightning.threads import heartbeat
from stateset_lightning.training.data import are_scripts
from stateset_lightning.training.reward_checks import check_rewards
from stateset_lightning.training.schedule import batches_per_epoch
from stateset_lightning.types import PromptBatch

_announce = rank_zero_only(logging.getLogger("stateset_lightning").log)

# Of a stage: the first must be given.
_SPLITS: dict[str, tuple[Split, ...]] = {"fit": ("train", "validation"), "validate": ("validation",)}
_SPLITS |= {"test": ("test",), "predict": ("predict",)}


@bounded("data")
class ScenarioDataModule(LightningDataModule):
    """Scenarios to train and evaluate on.

    Each of `train`, `validation`, `test` and `predict` is a path or glob (docs/data.md), a folder of `save_to_disk`,
    a hub id (owner/name, owner/name:config or owner/name:config:split), a list of such, of scenarios, or of sources
    with weights. In Python also a data set of `datasets`, an Arrow table, or a data frame of pandas.

    Args:
        train: Scenarios to train on.
        validation: Scenarios for validation.
        test: Scenarios for `test`.
        predict: Scenarios for `predict`.
        batch_size: Prompts per episode and device.
        eval_batch_size: Prompts per batch and device outside training; by default `batch_size`.
        num_iterations: Passes over an episode (GRPO's mu).
        steps_per_episode: Micro-steps that a pass is split into; auto: as many as memory asks for.
        fields: Our name -> the files' column, such as `prompt: question`; or a dotted path; or null for none.
        format: What shape the files' rows have; by default it is recognised by their columns.
        prompt_template: Jinja2 template of the prompt, over a row's columns.
        system_template: Jinja2 template of a row's own part of the system turn.
        row: A function, or its import path: a row -> a mapping with `prompt` and so on, or None to leave the row out.
        final_assistant_turn: What a last turn of the assistant is: target, prefill or error; by default the target.
        system_prompt: Comes before each scenario's own context in the system turn.
        use_chat_template: Whether prompts are made by the tokenizer's chat template; by default if it has one.
        chat_template_kwargs: Further variables of the chat template.
        max_prompt_tokens: Longest prompt in tokens; by default there is no limit.
        overlong_prompts: What happens to longer prompts: they are an error, are dropped, or keep their last tokens.
        parse_special_tokens: Whether special tokens in the scenarios' own text (`<|im_end|>`, say) count as such; by
            default they are plain text, so that no row changes who speaks.
        validation_fraction: Fraction of `train` to hold out for validation, if there is no `validation`.
        shuffle: Whether each epoch has an order of its own.
        curriculum: Draw prompts by how often they are solved, instead of each once per epoch.
        seed: Decides orders and the held out scenarios; by default the run's seed.
        tokenizer: A tokenizer object; by default the module's. Not for the command line.
    """

    def __init__(
        self,
        train: str | list[str] | list[Source | Row] | None = None,
        validation: str | list[str] | list[Source | Row] | None = None,
        test: str | list[str] | list[Source | Row] | None = None,
        predict: str | list[str] | list[Source | Row] | None = None,
        *,
        batch_size: Annotated[int, Ge(1)] = 8,
        eval_batch_size: Annotated[int, Ge(1)] | None = None,
        num_iterations: Annotated[int, Ge(1)] = 1,
        steps_per_episode: Annotated[int, Ge(1)] | Literal["auto"] = 1,
        fields: dict[str, str | None] | None = None,
        format: Format = "auto",
        prompt_template: str | None = None,
        system_template: str | None = None,
        row: str | Callable[..., Any] | None = None,
        final_assistant_turn: FinalTurn | None = None,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_tokens: Annotated[int, Ge(1)] | None = None,
        overlong_prompts: OverlongPolicy = "error",
        parse_special_tokens: bool = False,
        validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0,
        shuffle: bool = True,
        curriculum: Curriculum | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.specs: dict[Split, Any] = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_iterations = num_iterations
        self.steps_per_episode = 1 if steps_per_episode == "auto" else steps_per_episode
        self.rows = RowOptions().of(locals())
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.validation_fraction = validation_fraction
        self.shuffle = shuffle
        self.curriculum = Curriculum(**curriculum) if isinstance(curriculum, Mapping) else curriculum
        self.seed = seed
        self.tokenizer = tokenizer
        self.dropped: dict[str, int] = {}
        self.truncated: dict[str, int] = {}
        self._scenarios: dict[Split, ScenarioSet] = {}
        self._are_scripts = False  # whether user_responses are read as conversations
        self._now: datetime | None = None  # for templates that write the date: of the run's start, on rank 0
        self._encoder: PromptEncoder | None = None
        self._prompts: dict[Split, EncodedPrompts] = {}
        self._train_loader: EpisodeLoader | None = None
        self._resume_state: dict[str, Any] | None = None
        check_options(self)

    @property
    def num_scenarios(self) -> dict[Split, int]:
        """Scenarios of each split that was set up, without those that were dropped."""
        return {split: len(prompts.kept) for split, prompts in self._prompts.items()}

    @property
    def episodes_per_epoch(self) -> int:
        """Episodes that serve every training scenario once. Needs `setup("fit")`."""
        return -(-self.num_scenarios["train"] // (self.batch_size * self._ranks().world))

    @property
    def micro_steps_per_epoch(self) -> int:
        """Training batches of an epoch. Needs `setup("fit")`."""
        return self.episodes_per_epoch * self.num_iterations * self.steps_per_episode

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all splits that were set up; of large ones, the limit or what is known."""
        found = self._prompts.values()
        limit = any(len(prompts.tokens) < len(prompts.kept) for prompts in found) and self.max_prompt_tokens
        return limit or max((int(prompts.tokens.lengths.max()) for prompts in found), default=0)

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the files that the stage needs, and makes their prompts; only once, however often called.

        Raises:
            ConfigError: If the stage's split is not given, or there is no tokenizer.
            DataError: If files or rows cannot be used.
        """
        self._train_loader = self._resume_state = None
        if (scripts := are_scripts(self.trainer)) != self._are_scripts:  # another module's run: rows are read anew
            self._are_scripts, self._scenarios, self._prompts = scripts, {}, {}
        self._now = self._now or Ranks.current().gather(datetime.now().replace(microsecond=0))[0]
        if stage:
            self._check_given(_SPLITS[stage][0])
        wanted = [split for split in (_SPLITS[stage] if stage else self.specs) if self.is_given(split)]
        for split in (split for split in wanted if split not in self._scenarios):
            self._read(split)
        encoder = self.current_encoder()
        for split in (split for split in wanted if split not in self._prompts):
            self._encode(split, encoder)
        if rewards := getattr(getattr(self.trainer, "lightning_module", None), "rewards", None):
            check_rewards({k: found.known for k, found in self._scenarios.items() if k != "predict"}, rewards)

    def train_dataloader(self) -> EpisodeLoader:
        if self._train_loader is not None and self.trainer is not None and self.trainer.training:
            return self._train_loader  # `reload_dataloaders_every_n_epochs`: a new one would start anew
        scenarios, tokens = self.served("train")
        seed = run_seed(self.seed)
        rows, is_stream = scenarios.rows_by_source(), scenarios.stream is not None
        order = EpochOrder(rows, scenarios.weights, seed, self.shuffle, scenarios.names, goes_on=is_stream)
        curriculum, overfit = self.curriculum, getattr(self.trainer, "overfit_batches", 0)
        if curriculum and overfit:
            raise ConfigError(f"trainer.overfit_batches={overfit} contradicts data.curriculum: leave one out")
        decides: dict[str, Any] = {"seed": seed, "shuffle": self.shuffle, "sources": scenarios.mixture}
        decides |= {"curriculum": curriculum.fingerprint if curriculum else "", "prompts": scenarios.digest(tokens)}
        self._train_loader = loader = EpisodeLoader(
            self.served_prompts("train"),
            order,
            batch_size=self.batch_size,
            num_iterations=self.num_iterations,
            steps_per_episode=self.steps_per_episode,
            ranks=self._ranks(),
            # `overfit_batches` sets the Trainer's limit, too.
            limit=None if self.trainer is None else max(1, batches_per_epoch(self.trainer, self.micro_steps_per_epoch)),
            repeat=overfit > 0,
            solve_rates=None if curriculum is None else SolveRates(curriculum, order.row_weights, seed),
            fingerprint=decides,
        )
        if loader.num_filled and curriculum is None:
            made = f"{order.size} prompts make {loader.episodes_per_epoch} episodes of {loader.episode_size}"
            _announce(logging.INFO, f"data.train: {made}; the last is filled with {loader.num_filled} from the start")
        self._resume()
        return loader

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        if self.is_given("validation") or not self._is_fitting:
            return self._evaluation_loader("validation")
        # Lightning asks for a loader whether or not there is something to validate on.
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> EvaluationLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        return self._evaluation_loader("predict")

    def served(self, split: Split) -> tuple[ScenarioSet, RaggedTokens]:
        """The scenarios of a split that were kept, and their prompt tokens; of a large split, those of the first."""
        self._check_given(split)
        assert split in self._prompts, f"setup() has not been called for the {split} split"
        prompts = self._prompts[split]
        return self._scenarios[split].select(prompts.kept), prompts.tokens

    def served_prompts(self, split: Split) -> Prompts:
        """The same, from which batches are made."""
        (found, tokens), opened = self.served(split), self._prompts[split].opened
        is_large = isinstance(found.scenarios, ServedScenarios)
        encode = partial(self.current_encoder().encode, key=f"data.{split}", is_tried=True) if is_large else None
        return Prompts(found.scenarios, tokens, self.system_prompt, opened, encode)

    def replacements(self, batch: PromptBatch, slots: Sequence[int], round_number: int) -> PromptBatch:
        """Other training prompts in place of some of a batch's; see `EpisodeLoader.replacements`."""
        assert self._train_loader is not None, "there are batches to replace prompts of"
        return self._train_loader.replacements(batch, slots, round_number)

    def report_rewards(self, episode: int, rows: Sequence[int], totals_PG: Tensor) -> None:
        """Total rewards of an episode's groups, for the curriculum, if there is one; see `SolveRates.report`."""
        if self._train_loader is not None and self._train_loader.solve_rates is not None:
            self._train_loader.solve_rates.report(episode, rows, totals_PG)

    def state_dict(self) -> dict[str, Any]:
        """The training loader's state.

        Lightning saves and restores it too, but drops it where `trainer.estimated_stepping_batches` was read in
        `configure_optimizers` while `max_epochs` is set (its issue 20550): the loader is made before it is restored.
        """
        if (loader := self._train_loader) is None:
            return {}
        rates = {} if loader.solve_rates is None else {"solve_rates": loader.solve_rates.state_dict()}
        date = {"now": str(self._now)} if self.current_encoder().writes_date else {}
        state, rows = loader.state_dict(), self._scenarios["train"].stream
        stream = {} if rows is None else {"stream": rows.state_dict(int(state["epoch"]))}
        return {"train": state, **date, **rates, **stream}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "now" in state_dict and self._encoder is not None and self._encoder.writes_date:
            self._now = datetime.fromisoformat(state_dict["now"])
            for split in [*self._prompts]:
                self._encode(split, self.current_encoder())  # which drops all prompts if the date is another one
        # A checkpoint that is evaluated must not decide where a later fit starts.
        self._resume_state = state_dict if self._is_fitting and "train" in state_dict else None
        self._resume()  # the loader may be made early, as above, and restored late, as some strategies do

    def _resume(self) -> None:
        if (loader := self._train_loader) is not None and (state := self._resume_state) is not None:
            loader.load_state_dict(state["train"])  # refuses another curriculum
            if (rows := self._scenarios["train"].stream) is not None:
                rows.load_state_dict(state["stream"])
            if loader.solve_rates is not None:
                loader.solve_rates.load_state_dict(state["solve_rates"])

    @property
    def _is_fitting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == "fit"

    def is_given(self, split: Split) -> bool:
        return self.specs[split] is not None or (split == "validation" and self.validation_fraction > 0)

    def _check_given(self, split: Split) -> None:
        if not self.is_given(split):
            also = " or data.validation_fraction" if split == "validation" else ""
            raise ConfigError(f"data.{split} is not given; set it{also} to a path, a hub id or a list of scenarios")

    def _read(self, split: Split) -> None:
        held_out = self.validation_fraction > 0 and split in ("train", "validation")
        split = "train" if held_out else split
        heartbeat.doing("reading the data")
        found = self._scenarios[split] = read_split(self.specs[split], split, self.rows, are_scripts=self._are_scripts)
        for told in [f"{len(found)} scenarios from {', '.join(found.names)}", *found.notes]:
            _announce(logging.INFO, f"data.{split}: {told}")
        if held_out:
            train, validation = hold_out(found, self.validation_fraction, run_seed(self.seed))
            self._scenarios |= {"train": train, "validation": validation}
            _announce(logging.INFO, f"data.validation: {len(validation)} of them held out (data.validation_fraction)")

    def current_encoder(self) -> PromptEncoder:
        """Makes the prompts; a new one, and all prompts anew, if the tokenizer is another one than before."""
        tokenizer = self.tokenizer or getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if tokenizer is None:
            raise ConfigError("there is no tokenizer: the module has none; give ScenarioDataModule(tokenizer=...)")
        if self._encoder is None or self._encoder.tokenizer is not tokenizer or self._encoder.now != self._now:
            given = {**vars(self)["given_arguments"], "tokenizer": tokenizer, "now": self._now}
            names = [option.name for option in fields(PromptEncoder)]
            self._encoder = PromptEncoder(**{name: value for name in names if (value := given.get(name)) is not None})
            self._prompts.clear()
            if self._encoder.use_chat_template is None and not self._encoder.applies_template:
                _announce(logging.INFO, "the tokenizer has no chat template: turns are joined by blank lines")
            if self._encoder.writes_date:
                _announce(logging.INFO, f"the chat template writes the date: in this run it is always {self._now}")
        return self._encoder

    def _encode(self, split: Split, encoder: PromptEncoder) -> None:
        scenarios = self._scenarios[split].scenarios
        prompts = self._prompts[split] = encoder.encode(scenarios, f"data.{split}")
        if self._scenarios[split].notes:
            row = first_row(encoder.tokenizer, self._scenarios[split].known[prompts.kept[0]], prompts.tokens[0])
            _announce(logging.INFO, f"data.{split}: the first row is {row}")
        if first := next(filter(None, prompts.opened), ""):
            _announce(logging.INFO, f"data.{split}: the chat template opens the answer with {first!r}, for rewards too")
        self.dropped[split], self.truncated[split] = prompts.num_dropped, prompts.num_truncated
        if count := prompts.num_dropped or prompts.num_truncated:
            fate = "dropped" if prompts.num_dropped else "cut to their last tokens"
            told = f"{count} of {len(scenarios)} prompts have more than data.max_prompt_tokens={self.max_prompt_tokens}"
            _announce(logging.WARNING, f"data.{split}: {told} tokens and are {fate}")

    def _evaluation_loader(self, split: Split) -> EvaluationLoader:
        prompts, ranks = self.served_prompts(split), self._ranks()
        if (number := len(prompts.scenarios)) < ranks.world:
            # A device without a batch would leave the loop, and the others wait for it.
            raise ConfigError(f"data.{split} has {number} scenarios for {ranks.world} devices; give one for each")
        return EvaluationLoader(prompts, split, batch_size=self.eval_batch_size, ranks=ranks)

    def _ranks(self) -> Ranks:
        return Ranks() if self.trainer is None else Ranks(self.trainer.global_rank, self.trainer.world_size)
