"""Modules of version 0.1 that have another place now, or none: an import of the old name works, or says what replaces
it.

Names that stand in configs people have stay importable. Any other ends in an error that names the new place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "stateset_lightning."

STILL_WORKS = {
    "policy.schedule": "training.schedule",
    "sharding": "run.fsdp_strategy",
}
"""Old name -> the module that it stands for."""

GONE = {
    "callbacks.live_view": "Lightning's progress bars show a run live, `stateset-lightning report` shows it as a page",
    "completion": "the command line has no shell completion any more; --help lists every key",
    "estimate": "`stateset-lightning doctor` measures memory and time",
    "evaluation.rewards": "stateset_lightning.evaluation.Evaluation measures rewards too",
    "rewards.retry": "retry inside the reward, with the library tenacity, say; a ModelJudge retries by itself",
    "tiny.arithmetic": "scripts/arithmetic.py of the repository",
    "tiny.train": "scripts/make_tiny.py of the repository",
}
"""Old name -> what to use instead."""

_MOVED = """
    algorithm.base=algorithm.algorithm algorithm.beta_normalisation=algorithm.advantages
    algorithm.clipped_presets=algorithm.presets algorithm.ratio_presets=algorithm.presets
    algorithm.reinforce_presets=algorithm.presets
    algorithm.entropy=algorithm.terms algorithm.kl=algorithm.terms algorithm.mismatch=algorithm.terms
    algorithm.pass_at_k=algorithm.advantages algorithm.segments=algorithm.aggregation
    algorithm.selection=algorithm.terms algorithm.sequence_losses=algorithm.losses bad_steps=run.records
    bounds=errors callbacks.last_checkpoint=run.step_end callbacks.metrics_file=run.metrics_file
    callbacks.run_folder=run.folder callbacks.sample_tables=run.samples callbacks.step_end=run.step_end
    checkpoint_io=run.checkpoint_io cli_messages=cli.messages collection=training.collect convert=cli.convert
    daemon_threads=threads data.control_tokens=data.prompts data.curriculum=data.order data.holdout=data.sources
    data.packing=data.ragged data.tasks=data.reasoning_gym doctor=cli.doctor dynamic_sampling=training.resample
    environment=run.system episode=training.episode evaluation.prompts=evaluation.means
    export=cli.export extras=errors fixed_logprobs=training.loss
    generate=cli.generate lightning_cli=cli.config loss=training.loss metrics=training.metrics
    micro_steps=training.episode policy.adapter_state=policy.lora_state policy.adapters=policy.lora
    policy.lean_layers=policy.recomputed_layers policy.prefix_attention=policy.packed_attention
    policy.shared_prompts=policy.packed_attention records=run.records report=cli.report
    resumable=run.checkpoint resume=run.find_checkpoint rewards.embedding=rewards.models rewards.interface=rewards.base
    rewards.reply_cache=rewards.judge rewards.reward_model=rewards.models rollout.config=rollout.engine
    rollout.fast_linear=rollout.cpu_decoding rollout.lean_decoder=rollout.cpu_decoding
    rollout.stopping=rollout.sampling rollout.vllm_server=rollout.vllm_client run_checks=training.checks
    sampling_ahead=training.sampling_ahead text_model=rewards.models trained=cli.trained
"""
MOVED = dict(pair.split("=") for pair in _MOVED.split())
"""Old name -> the module with its contents."""


class _OldNames(MetaPathFinder, Loader):
    """Comes after all other finders, so that it is asked for names alone that nobody else has."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix(PACKAGE)
        if name == fullname:
            return None
        if name in STILL_WORKS:
            return ModuleSpec(fullname, self)
        if name in MOVED:
            raise ModuleNotFoundError(f"{fullname} is now {PACKAGE}{MOVED[name]}", name=fullname)
        if name in GONE:
            raise ModuleNotFoundError(f"{fullname} is gone: {GONE[name]}", name=fullname)
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the new module in the old one's place."""
        sys.modules[module.__name__] = import_module(PACKAGE + STILL_WORKS[module.__name__.removeprefix(PACKAGE)])


def install() -> None:
    """Makes the old names known to `import`, once."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
