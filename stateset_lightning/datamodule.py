"""ScenarioDataModule: files of scenarios in, prompt batches out."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from lightning.pytorch import LightningDataModule
from torch import Tensor

from stateset_lightning.data.loader import EpisodeLoader, EvaluationLoader, Prompts
from stateset_lightning.data.order import Curriculum, EpochOrder, SolveRates
from stateset_lightning.data.prompts import EncodedPrompts, PromptEncoder
from stateset_lightning.data.ragged import PackedTokens
from stateset_lightning.data.sources import ScenarioSet, Source, hold_out, read_split
from stateset_lightning.errors import ConfigError, check_bounds
from stateset_lightning.seeding import run_seed
from stateset_lightning.types import PromptBatch

_log = logging.getLogger("stateset_lightning")

Split = Literal["train", "validation", "test", "predict"]
_STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class ScenarioDataModule(LightningDataModule):
    """Scenarios to train and evaluate on.

    Each of `train`, `validation`, `test` and `predict` is a path or glob (.jsonl, .json, .csv, .yaml, .parquet), a hub
    id (owner/name, owner/name:config or owner/name:config:split), a list of scenarios, or a list of sources with
    weights.

    Args:
        train: Scenarios to train on.
        validation: Scenarios for validation.
        test: Scenarios for `test`.
        predict: Scenarios for `predict`.
        batch_size: Prompts per episode and device.
        eval_batch_size: Prompts per batch and device outside training; by default `batch_size`.
        num_iterations: Passes over an episode (GRPO's mu).
        steps_per_episode: Micro-steps that a pass is split into.
        fields: Our name -> the files' column, such as `prompt: question` and `target: answer`.
        system_prompt: Stands before each scenario's own context in the system turn.
        use_chat_template: Whether prompts are made by the tokenizer's chat template; by default if it has one.
        chat_template_kwargs: Further variables of the chat template.
        max_prompt_tokens: Longest prompt in tokens; by default there is no limit.
        overlong_prompts: What happens to longer prompts: they are an error, are dropped, or keep their last tokens.
        parse_special_tokens: Whether control tokens in the scenarios' own text (`<|im_end|>`, say) count as such; by
            default they are plain text, so that no row changes who speaks.
        validation_fraction: Fraction of `train` to hold out for validation, if there is no `validation`.
        shuffle: Whether each epoch has an order of its own.
        curriculum: Draw prompts by how often they are solved, instead of each once per epoch.
        seed: Decides orders and the held out scenarios; by default the run's seed.
        tokenizer: A tokenizer object; by default the module's. Not for the command line.
    """

    def __init__(
        self,
        train: str | list[Source | dict[str, Any]] | None = None,
        validation: str | list[Source | dict[str, Any]] | None = None,
        test: str | list[Source | dict[str, Any]] | None = None,
        predict: str | list[Source | dict[str, Any]] | None = None,
        *,
        batch_size: Annotated[int, Ge(1)] = 8,
        eval_batch_size: Annotated[int, Ge(1)] | None = None,
        num_iterations: Annotated[int, Ge(1)] = 1,
        steps_per_episode: Annotated[int, Ge(1)] = 1,
        fields: dict[str, str] | None = None,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_tokens: Annotated[int, Ge(1)] | None = None,
        overlong_prompts: Literal["error", "drop", "truncate_left"] = "error",
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
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_iterations = num_iterations
        self.steps_per_episode = steps_per_episode
        self.fields = fields
        self.system_prompt = system_prompt
        self.use_chat_template = use_chat_template
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong_prompts = overlong_prompts
        self.parse_special_tokens = parse_special_tokens
        self.validation_fraction = validation_fraction
        self.shuffle = shuffle
        self.curriculum = Curriculum(**curriculum) if isinstance(curriculum, Mapping) else curriculum
        self.seed = seed
        self.tokenizer = tokenizer
        self.dropped: dict[str, int] = {}
        self.truncated: dict[str, int] = {}
        self._scenarios: dict[Split, ScenarioSet] = {}
        self._encoder: PromptEncoder | None = None
        self._prompts: dict[Split, EncodedPrompts] = {}
        self._train_loader: EpisodeLoader | None = None
        self._resume_state: dict[str, Any] | None = None
        self._check_options()

    @property
    def num_scenarios(self) -> dict[str, int]:
        """Scenarios of each split that was set up, without those that were dropped."""
        return {split: len(prompts.kept) for split, prompts in self._prompts.items()}

    @property
    def episodes_per_epoch(self) -> int:
        """Episodes that serve every training scenario once. Needs `setup("fit")`."""
        return -(-self.num_scenarios["train"] // (self.batch_size * self._rank_and_world()[1]))

    @property
    def micro_steps_per_epoch(self) -> int:
        """Training batches of an epoch. Needs `setup("fit")`."""
        return self.episodes_per_epoch * self.num_iterations * self.steps_per_episode

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all splits that were set up."""
        return max((int(prompts.tokens.lengths.max()) for prompts in self._prompts.values()), default=0)

    @property
    def has_validation(self) -> bool:
        return self._is_given("validation")

    def named_rewards(self) -> dict[str, tuple[str, ...]]:
        """The rewards that scenarios name, by `split: scenario id`; scenarios that leave it open are not among them."""
        sets = self._scenarios.items()
        return {
            f"data.{split}: {s.id}": s.rewards
            for split, scenarios in sets
            for s in scenarios.scenarios
            if s.rewards is not None
        }

    def setup(self, stage: str | None = None) -> None:
        """Read and check the files that the stage needs, and make their prompts; once, also if called again.

        Raises:
            ConfigError: If the stage's split is not given, or there is no tokenizer.
            DataError: If files or rows cannot be used.
        """
        self._train_loader = self._resume_state = None
        wanted = [split for split in (_STAGES[stage] if stage else self.specs) if self._is_given(split)]
        if stage and _STAGES[stage][0] not in wanted:
            raise self._missing(_STAGES[stage][0])
        for split in wanted:
            self._read(split)
        self._encode(wanted)

    def train_dataloader(self) -> EpisodeLoader:
        scenarios, tokens = self.served("train")
        rank, world_size = self._rank_and_world()
        seed = self._resolved_seed()
        order = EpochOrder(scenarios.rows_by_source(), scenarios.weights, seed, self.shuffle, scenarios.names)
        curriculum, overfit = self.curriculum, getattr(self.trainer, "overfit_batches", 0)
        if curriculum and overfit:
            raise ConfigError(
                f"trainer.overfit_batches={overfit} repeats the same prompts, data.curriculum draws others: leave"
                " one out"
            )
        loader = EpisodeLoader(
            Prompts(scenarios.scenarios, tokens, self.system_prompt),
            order,
            batch_size=self.batch_size,
            num_iterations=self.num_iterations,
            steps_per_episode=self.steps_per_episode,
            rank=rank,
            world_size=world_size,
            limit=self._limit(),
            repeat=overfit > 0,
            solve_rates=None if curriculum is None else SolveRates(curriculum, order.row_weights, seed),
            fingerprint={
                "seed": seed,
                "shuffle": self.shuffle,
                "sources": scenarios.mixture,
                "curriculum": "" if curriculum is None else curriculum.fingerprint,
                "prompts": tokens.digest(),
            },
        )
        if loader.num_filled and curriculum is None:
            self._announce(
                f"data.train: {order.size} prompts make {loader.episodes_per_epoch} episodes of"
                f" {self.batch_size * world_size}; the last of an epoch is filled up with {loader.num_filled} from its"
                " start"
            )
        self._train_loader = loader
        self._resume()
        return loader

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        if self._is_given("validation") or not self._is_fitting:
            return self._evaluation_loader("validation")
        # Lightning asks for a loader whether or not there is something to validate on.
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> EvaluationLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        return self._evaluation_loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """The training loader's state.

        Lightning saves and restores the loader's state too, but drops it where `trainer.estimated_stepping_batches` was
        read in `configure_optimizers` while `max_epochs` is set (its issue 20550): the loader is then made before the
        state is restored.
        """
        if (loader := self._train_loader) is None:
            return {}
        rates = {} if loader.solve_rates is None else {"solve_rates": loader.solve_rates.state_dict()}
        return {"train": loader.state_dict(), **rates}

    def replacements(self, batch: PromptBatch, slots: Sequence[int], round_number: int) -> PromptBatch:
        """Other training prompts in place of some of a batch's; see `EpisodeLoader.replacements`."""
        assert self._train_loader is not None, "there are batches to replace prompts of"
        return self._train_loader.replacements(batch, slots, round_number)

    def report_rewards(self, episode: int, rows: Sequence[int], totals_PG: Tensor) -> None:
        """What an episode's groups, of all ranks and in one order on each, scored; see `SolveRates.report`. Without
        curriculum: nothing.
        """
        if self._train_loader is not None and self._train_loader.solve_rates is not None:
            self._train_loader.solve_rates.report(episode, rows, totals_PG)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A checkpoint that is evaluated must not decide where a later fit starts.
        self._resume_state = state_dict if self._is_fitting and "train" in state_dict else None
        self._resume()  # the loader may be made early, as above, and restored late, as some strategies do

    def _resume(self) -> None:
        if (loader := self._train_loader) is not None and (state := self._resume_state) is not None:
            loader.load_state_dict(state["train"])  # refuses another curriculum
            if loader.solve_rates is not None:
                loader.solve_rates.load_state_dict(state["solve_rates"])

    def _check_options(self) -> None:
        check_bounds("data", ScenarioDataModule.__init__, vars(self))
        if self.curriculum is not None and not self.shuffle:
            raise ConfigError(
                "data.shuffle=False keeps the rows' order, data.curriculum draws by solve rate: leave one of them out"
            )
        if self.overlong_prompts not in ("error", "drop", "truncate_left"):
            raise ConfigError(f"data.overlong_prompts={self.overlong_prompts!r} must be error, drop or truncate_left")
        if self.validation_fraction and self.specs["validation"] is not None:
            raise ConfigError(
                f"data.validation and data.validation_fraction={self.validation_fraction} are both given; leave one of"
                " them out"
            )
        if self.validation_fraction and self.specs["train"] is None:
            raise ConfigError(
                f"data.validation_fraction={self.validation_fraction} is a fraction of data.train, which is not given"
            )
        if isinstance(self.tokenizer, str):
            raise ConfigError(
                f"data.tokenizer={self.tokenizer!r} must be a tokenizer object; leave it out to use the model's"
            )

    @property
    def _is_fitting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == "fit"

    def _is_given(self, split: Split) -> bool:
        return self.specs[split] is not None or (split == "validation" and self.validation_fraction > 0)

    def _missing(self, split: Split) -> ConfigError:
        alternative = " or data.validation_fraction" if split == "validation" else ""
        return ConfigError(f"data.{split} is not given; set it{alternative} to a path, a hub id or a list of scenarios")

    def _read(self, split: Split) -> None:
        if split in self._scenarios:
            return
        held_out = self.validation_fraction > 0 and split in ("train", "validation")
        source: Split = "train" if held_out else split
        scenarios = read_split(self.specs[source], source, self.fields)
        self._announce(f"data.{source}: {len(scenarios)} scenarios from {', '.join(scenarios.names)}")
        if not held_out:
            self._scenarios[split] = scenarios
            return
        train, validation = hold_out(scenarios, self.validation_fraction, self._resolved_seed())
        self._scenarios["train"], self._scenarios["validation"] = train, validation
        self._announce(
            f"data.validation: {len(validation)} of them held out (data.validation_fraction={self.validation_fraction})"
        )

    def _encode(self, splits: list[Split]) -> None:
        tokenizer = self._resolved_tokenizer()
        if self._encoder is None or self._encoder.tokenizer is not tokenizer:
            self._encoder = PromptEncoder(
                tokenizer=tokenizer,
                system_prompt=self.system_prompt,
                use_chat_template=self.use_chat_template,
                chat_template_kwargs=self.chat_template_kwargs,
                max_prompt_tokens=self.max_prompt_tokens,
                overlong_prompts=self.overlong_prompts,
                parse_special_tokens=self.parse_special_tokens,
            )
            self._prompts.clear()
            if self.use_chat_template is None and not self._encoder.applies_template:
                self._announce(
                    "the tokenizer has no chat template: prompts are plain text, their turns joined by blank lines"
                )
        for split in splits:
            if split not in self._prompts:
                self._prompts[split] = prompts = self._encoder.encode(self._scenarios[split].scenarios, f"data.{split}")
                self._count_overlong(split, prompts)

    def _count_overlong(self, split: Split, prompts: EncodedPrompts) -> None:
        self.dropped[split] = prompts.num_dropped
        self.truncated[split] = prompts.num_truncated
        if count := prompts.num_dropped or prompts.num_truncated:
            fate = "dropped" if prompts.num_dropped else "cut to their last tokens"
            limit = f"data.max_prompt_tokens={self.max_prompt_tokens}"
            message = (
                f"data.{split}: {count} of {len(self._scenarios[split])} prompts have more than {limit} tokens and are"
                f" {fate}"
            )
            self._announce(message, logging.WARNING)

    def served(self, split: Split) -> tuple[ScenarioSet, PackedTokens]:
        """The scenarios of a split that were kept, and their prompts."""
        if not self._is_given(split):
            raise self._missing(split)
        assert split in self._prompts, f"setup() has not been called for the {split} split"
        prompts = self._prompts[split]
        return self._scenarios[split].select(prompts.kept), prompts.tokens

    def _evaluation_loader(self, split: Literal["validation", "test", "predict"]) -> EvaluationLoader:
        scenarios, tokens = self.served(split)
        rank, world_size = self._rank_and_world()
        if len(scenarios) < world_size:
            # A device without a batch would leave the loop, and the others wait for it.
            raise ConfigError(
                f"data.{split} has {len(scenarios)} scenarios for {world_size} devices; give at least one for each"
                " device"
            )
        prompts = Prompts(scenarios.scenarios, tokens, self.system_prompt)
        return EvaluationLoader(prompts, split, batch_size=self.eval_batch_size, rank=rank, world_size=world_size)

    def _limit(self) -> int | None:
        """Training batches that the trainer takes per epoch, if it says so; `overfit_batches` sets this too."""
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        if isinstance(limit, float):  # a fraction
            limit = int(self.micro_steps_per_epoch * limit)
        return max(1, limit) if limit is not None else None

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _resolved_seed(self) -> int:
        return run_seed() if self.seed is None else self.seed

    def _resolved_tokenizer(self) -> Any:
        module = None if self.trainer is None else self.trainer.lightning_module
        tokenizer = getattr(module, "tokenizer", None) if self.tokenizer is None else self.tokenizer
        if tokenizer is None:
            raise ConfigError("there is no tokenizer: the module has none; give ScenarioDataModule(tokenizer=...)")
        return tokenizer

    def _announce(self, message: str, level: int = logging.INFO) -> None:
        if self._rank_and_world()[0] == 0:
            _log.log(level, message)
