"""What must hold before the first step, between data, model and the Trainer's options; and after every step.

Before the first step each check raises ConfigError with the remedy, or warns. Lightning and the engine would find out
later: after an episode has been sampled, after the first validation, or never.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.errors import ConfigError, NonFiniteError
from stateset_lightning.evaluation import Evaluation
from stateset_lightning.policy.precision import has_bfloat16_products, sampling_dtype
from stateset_lightning.ranks import unsharded
from stateset_lightning.rewards import FunctionReward, GroupReward, TRLReward
from stateset_lightning.rollout.sampling import check_length
from stateset_lightning.rollout.targets import Targets
from stateset_lightning.training.data import check_scripts, data_of
from stateset_lightning.training.metrics import NAMES
from stateset_lightning.training.reward_checks import check_baseline, check_environment
from stateset_lightning.training.schedule import accumulations, batches_per_epoch, optimizer_steps_of_run
from stateset_lightning.training.teacher import check_teacher
from stateset_lightning.types import PromptBatch

if TYPE_CHECKING:
    from stateset_lightning.datamodule import ScenarioDataModule
    from stateset_lightning.policy import Policy

BUNDLED, WRAPPERS = "stateset_lightning.rewards.", (FunctionReward, TRLReward)
# Names of metrics that nobody minimises.
HIGHER_IS_BETTER = (
    r"train/(baseline_)?reward|groups/all_right|val/(topic/.+/)?(reward|solved(_low|_high)?|(avg|majority|pass)[@^]\d+)"
)


def checks_before_weights(data: "ScenarioDataModule | None", module: Any) -> list[Callable[[], None]]:
    """The checks that need no model: what they refuse is refused before one is loaded, or a baseline validated.

    Args:
        data: Set up; None with plain loaders.
        module: A GRPOLightningModule.
    """
    rollout, longest = module.rollout, 0 if data is None else data.longest_prompt
    return [
        partial(check_targets, data, module),
        partial(check_scripts, data, module.environment),
        partial(check_dynamic_sampling, data, rollout.dynamic_sampling, module.algorithm),
        partial(check_baseline, module.rewards, module.algorithm.needs_greedy_baseline),
        partial(check_environment, module.environment, module.rewards, module.algorithm),
        partial(check_teacher, module.teacher, module.tokenizer, longest, rollout.max_new_tokens),
    ]


def checks_of_run(trainer: Trainer, module: Any) -> list[Callable[[], None]]:
    """The checks before the first step, behind `checks_before_weights`; the last ones only tell.

    Args:
        trainer: With its datamodule set up, and its optimizers.
        module: A GRPOLightningModule with its policy loaded.
    """
    data = data_of(trainer)
    return [
        partial(check_episode_fits_trainer, trainer, data),
        partial(check_monitors, trainer, module),
        partial(check_quantized, module.policy),
        partial(check_context, data, module.policy.context_length, module.rollout.max_new_tokens),
        partial(check_speed, trainer, module.policy.model.dtype),
        partial(tell_of_targets, module),
    ]


def check_episode_fits_trainer(trainer: Trainer, data: "ScenarioDataModule | None") -> None:
    """An optimizer step never straddles two passes over an episode, and a run never ends an epoch inside an episode.

    Raises:
        ConfigError: If an interval is not above 0, `accumulate_grad_batches` does not divide `steps_per_episode`,
            `limit_train_batches` cuts an episode, or validation waits for more micro-steps than an epoch has.
    """
    for name in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
        value = getattr(trainer, name)
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"trainer.{name}={value} must be above 0; trainer.limit_val_batches=0 never validates")
    steps_per_episode = 1 if data is None else data.steps_per_episode
    scheduled = sorted(set(accumulations(trainer).values()))
    accumulate = math.lcm(*scheduled)
    if steps_per_episode % accumulate:
        several = f"GradientAccumulationScheduler: each of {scheduled}"
        given = several if len(scheduled) > 1 else f"trainer.accumulate_grad_batches={accumulate}"
        remedy = f"set data.steps_per_episode to {accumulate * math.ceil(steps_per_episode / accumulate)}"
        raise ConfigError(f"{given} must divide data.steps_per_episode={steps_per_episode}: {remedy}")
    if data is None:
        return
    prompts = data.batch_size * trainer.world_size
    if (steps := steps_per_episode // accumulate) > prompts:
        made = f"data.steps_per_episode={steps_per_episode} makes {steps} optimizer steps of {prompts} prompts"
        raise ConfigError(f"{made}, some empty: set it to at most {prompts * accumulate}, or raise data.batch_size")
    micro_steps = steps_per_episode * data.num_iterations
    batches = batches_per_epoch(trainer, data.micro_steps_per_epoch)
    if batches % micro_steps:
        given = f"trainer.limit_train_batches={trainer.limit_train_batches} ends an epoch inside an episode"
        whole = max(1, batches // micro_steps) * micro_steps
        raise ConfigError(f"{given} of {micro_steps} micro-steps: set it to {whole}")
    interval = trainer.val_check_interval
    validates_in_epochs = trainer.check_val_every_n_epoch and trainer.limit_val_batches
    if validates_in_epochs and isinstance(interval, int) and interval > batches:
        given = f"trainer.val_check_interval={interval} is more than the {batches} micro-steps of an epoch"
        raise ConfigError(f"{given}: set trainer.check_val_every_n_epoch to null, and it counts over epochs")


def check_strategy(trainer: Trainer, supported: tuple[type, ...]) -> None:
    """Sampling and reductions are right for these strategies; others would hang, or reduce by another rule.

    Raises:
        ConfigError: For any other.
    """
    if not isinstance(trainer.strategy, supported):
        kind = type(trainer.strategy).__name__
        raise ConfigError(f"trainer.strategy={kind} is not supported: use auto, ddp for several devices, or fsdp2")


def check_dynamic_sampling(data: "ScenarioDataModule | None", rounds: int, algorithm: Algorithm) -> None:
    """Dynamic sampling has other prompts to take, and an algorithm that learns nothing from a constant group.

    Raises:
        ConfigError: If not.
    """
    given = f"model.rollout.dynamic_sampling={rounds} replaces"
    if rounds and algorithm.learns_from_equal_rewards:
        raise ConfigError(f"{given} groups of equal rewards, from which {type(algorithm).__name__} learns: set it to 0")
    if rounds and data is None:
        raise ConfigError(f"{given} prompts, which a plain loader cannot: use a ScenarioDataModule, or set it to 0")


def check_targets(data: "ScenarioDataModule | None", module: Any) -> None:
    """Where targets are trained on, each row has one that fits, and nothing is set that only samples could honour.

    Raises:
        ConfigError: If something is.
        DataError: If a row has none; of a large split, one of the first.
    """
    if not module.algorithm.trains_on_targets:
        return
    rollout = module.rollout
    names = "dynamic_sampling", "sampling_ahead", "keep_sampling_mask"
    needs_samples = {f"model.rollout.{name}": getattr(rollout, name) for name in names}
    needs_samples |= {"data.curriculum": data and data.curriculum, "model.environment": module.environment}
    for key, value in needs_samples.items():
        if value:
            raise ConfigError(f"{key}={value} has no effect: {_on_targets(module.algorithm)}; leave it out")
    if data is not None:
        Targets.of(module.tokenizer, rollout, data).encode(data.served("train")[0].known)


def tell_of_targets(module: Any) -> None:
    """Announces what follows where targets are trained on."""
    if module.algorithm.trains_on_targets:
        rank_zero_info(f"{_on_targets(module.algorithm)}: model.rollout.num_generations has no effect on it")


def _on_targets(algorithm: Algorithm) -> str:
    return f"{type(algorithm).__name__} trains on one target per prompt, and not samples"


def check_monitors(trainer: Trainer, module: Any) -> None:
    """A callback that monitors a metric gets it, and keeps its best. Lightning would say so later, or never.

    Raises:
        ConfigError: If there is no validation data, the metric is never logged, or it is a reward and `mode` is `min`.
            Not for want of a validation where a ModelCheckpoint keeps the newest state anyway: it may be a short try.
    """
    data = data_of(trainer)
    alone = [reward.name for reward in module.rewards if not isinstance(reward, GroupReward)]
    known = [f"val/{name}" for name in Evaluation(alone, module.evaluation).logged_names()]
    known = known if module.scorer.scores_alone else [name for name in known if name != "val/reward"]
    never = no_validation(trainer, data)
    # One of the user's own may be a cost, whose lowest mean is the best.
    bundled = [r for r in module.rewards if type(r).__module__.startswith(BUNDLED) and type(r) not in WRAPPERS]
    maximised = [f"(val/)?reward/{re.escape(reward.name)}" for reward in bundled if reward.weight > 0]
    higher = re.compile("|".join((HIGHER_IS_BETTER, *maximised)))
    checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
    saves = any(callback.save_last or (callback.monitor is None and callback.save_top_k) for callback in checkpoints)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str):
            continue
        place = f"{type(callback).__name__}.monitor={monitor}"
        if not monitor.startswith("val"):
            _check_train_metric(place, monitor, trainer, module)
        elif data is not None and not data.is_given("validation"):
            remedy = "set data.validation or data.validation_fraction, or another monitor"
            raise ConfigError(f"{place}: nothing to validate on; {remedy}")
        elif re.sub(r"^val/topic/.+/", "val/topic/<topic>/", monitor) not in known and not _logs_more(trainer, module):
            raise ConfigError(f"{place}: validation logs no such metric; it logs {', '.join(known)}")
        elif never and not (saves and isinstance(callback, ModelCheckpoint)):
            raise ConfigError(f"{place}: {never}; validate within the run, or choose another monitor")
        if higher.fullmatch(monitor) and getattr(callback, "mode", "max") == "min":
            raise ConfigError(f"{place} with mode=min takes the worst for the best: set mode: max")


def _logs_more(trainer: Trainer, module: Any) -> bool:
    """Whether code of the user's own runs, which may log whatever it likes."""
    parts = [module, module.algorithm, module.engine, *trainer.callbacks]  # type: ignore[attr-defined]
    makers = {type(part).__module__.partition(".")[0] for part in parts if part is not None}
    return bool(makers - {"stateset_lightning", "lightning"})


def _check_train_metric(place: str, monitor: str, trainer: Trainer, module: Any) -> None:
    if _logs_more(trainer, module) or monitor.startswith("lr-") or not NAMES:  # `lr-...` is of LearningRateMonitor
        return
    names = {*NAMES, "step", *(f"reward/{reward.name}" for reward in module.rewards)} - {"reward/<name>"}
    if not any(re.fullmatch(re.sub("<.+?>", ".+", re.escape(name)), monitor) for name in names):
        close = " or ".join(get_close_matches(monitor, names, 2)) or "one of docs/metrics.md"
        raise ConfigError(f"{place}: training logs no such metric; did you mean {close}?")


def no_validation(trainer: Trainer, data: "ScenarioDataModule | None") -> str:
    """Why the run never validates, as far as its options tell; empty if it does."""
    if trainer.limit_val_batches == 0:
        return "validation never runs: trainer.limit_val_batches=0"
    steps = optimizer_steps_of_run(trainer)
    # by a clock (the attribute that Lightning asks, 2.6.6), or without an end
    if data is None or steps is None or getattr(trainer, "_val_check_time_interval", None) is not None:
        return ""
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    per_epoch, run = batches_per_epoch(trainer, data.micro_steps_per_epoch), steps * trainer.accumulate_grad_batches
    first = interval if isinstance(interval, int) else max(1, int(per_epoch * interval))
    if run >= first + per_epoch * ((epochs or 1) - 1):
        return ""
    of_epochs = f" and check_val_every_n_epoch={epochs}" if epochs else ""
    return f"validation never runs: trainer.val_check_interval={interval}{of_epochs}, the run has {run:,} micro-steps"


def check_speed(trainer: Trainer, dtype: torch.dtype) -> None:
    """Warns of half precision on a CPU that has no arithmetic for it, and of float32 on a GPU, which has."""
    is_half = dtype.itemsize == 2 or sampling_dtype(str(trainer.precision)) is not None
    device = trainer.strategy.root_device.type
    if device == "cuda" and not is_half:
        rank_zero_warn(f"trainer.precision={trainer.precision} on a GPU: bf16- or 16-mixed is several times as fast")
    if is_half and device == "cpu" and not has_bfloat16_products():
        given = f"trainer.precision={trainer.precision} with {str(dtype).removeprefix('torch.')} weights"
        rank_zero_warn(f"{given}: slow on this CPU; set trainer.precision=32-true, model.policy.dtype=float32")


def check_quantized(policy: "Policy") -> None:
    """Gradients pass the weights that are trained.

    Raises:
        ConfigError: If they are quantized: only norms and biases would be trained.
    """
    if policy.adapter is None and getattr(policy.model, "hf_quantizer", None) is not None:
        why = "its weights are quantized, and no gradient passes them: train an adapter, model.policy.lora"
        raise ConfigError(f"model.policy.model_name={policy.config.model_name!r}: {why}")


def check_context(data: "ScenarioDataModule | None", context_length: int | None, max_new_tokens: int) -> None:
    """The longest prompt and its completion fit into the model; the engine would find out when it meets the prompt.

    Raises:
        ConfigError: If they do not.
    """
    if context_length is not None:
        longest = 0 if data is None else data.longest_prompt
        check_length(longest, max_new_tokens, context_length, f"the model's {context_length} positions")


def check_batch(batch: Any) -> None:
    """A loader serves what a step is made of.

    Raises:
        ConfigError: If it is a loader of the user's own, which serves something else.
    """
    if not isinstance(batch, PromptBatch):
        remedy = "give the rows to ScenarioDataModule(train=...), or one of its loaders to the Trainer"
        raise ConfigError(f"the loader serves batches of {type(batch).__name__}, and not PromptBatch: {remedy}")


# After every step -----------------------------------------------------------------------------------------------------


def total_norm(tensors: Sequence[Tensor], norm_type: float = 2.0) -> float:
    """Norm of all tensors together, over all ranks where they are sharded; 0 of none."""
    return float(unsharded(torch.nn.utils.get_total_norm(tensors, norm_type)))


def is_bad(norm: float) -> bool:
    """Whether a gradient of this norm must not be applied: NaN, infinite, or its square is infinite in float32.

    AdamW keeps squares: an infinite one would never leave its second moment, and stop the parameter for good.
    """
    return not norm**2 < torch.finfo(torch.float32).max


def check_bad_steps(in_a_row: int, limit: int, step: int) -> None:
    """Skipped optimizer steps are an exception, not the rule: loss scaling overflows now and then, a diverged policy
    always.

    Raises:
        NonFiniteError: After more than `limit` in a row.
    """
    if in_a_row > limit:
        bad = f"the gradient was not finite in {in_a_row} optimizer steps in a row (model.max_bad_steps={limit})"
        raise NonFiniteError(f"{bad}, last at step {step}: lower the rate, set trainer.gradient_clip_val or bf16-mixed")


def check_weights(parameters: Iterable[Tensor], step: int) -> None:
    """A finite gradient can still make infinite weights; the run ends before a checkpoint could hold them.

    Raises:
        NonFiniteError: If it did.
    """
    weights = [p.detach() for p in parameters if p.requires_grad]
    # The Euclidean norm is four times as fast as the largest weight, but infinite of some finite weights too.
    if not math.isfinite(total_norm(weights)) and not math.isfinite(total_norm(weights, norm_type=math.inf)):
        remedy = "lower the learning rate and set trainer.gradient_clip_val, then go on from the last checkpoint"
        raise NonFiniteError(f"weights are not finite after optimizer step {step}: {remedy}, which was made before")
