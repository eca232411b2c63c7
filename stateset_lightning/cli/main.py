"""The command line: `stateset-lightning fit | validate | test | predict --config FILE`.

LightningCLI with this kit's module and datamodule: typed keys, `--print_config`, overlays by repeated `--config`, any
key as a flag. What a user can mend is reported in a few lines; anything else keeps its traceback. Lightning is imported
only when a subcommand runs.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from stateset_lightning.cli.convert import main as convert
from stateset_lightning.cli.messages import PROGRAM, check_config_files, without_traceback
from stateset_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

    from stateset_lightning.cli.config import StatesetCLI

OVERVIEW = """\
usage: stateset-lightning {fit,validate,test,predict} --config FILE [--config OVERLAY] [--KEY VALUE] ...

GRPO for single-turn language tasks.

  fit        train, and validate on the way
  validate   greedy answers to data.validation, scored
  test       greedy answers to data.test, scored
  predict    greedy answers to data.predict, written as JSON lines
  generate   try a checkpoint on a prompt: generate --ckpt_path CKPT [--prompt TEXT]
  export     a plain Hugging Face folder with a model card: export CKPT OUT [--merge]
  report     one HTML page about a run: report RUN [-o FILE]
  convert    the guide's YAML to a config: convert GUIDE [-o FILE]
  doctor     before a long run: data, memory, work, one reward call, contradictions: doctor --config FILE

Every key of a config is a flag as well (--trainer.max_steps 100), and wins over the files; of several files, the later one wins.
  stateset-lightning fit --config configs/single_turn.yaml
  stateset-lightning fit --config configs/single_turn.yaml --print_config   the resolved config, without running it
  stateset-lightning fit --config FILE --ckpt_path CHECKPOINT               resume
  stateset-lightning fit --help                                             all keys
"""

DOCTOR = """\
usage: stateset-lightning doctor --config FILE [--config OVERLAY] [--KEY VALUE] ... [--sample false]

What a config amounts to, before a long run: the config without defaults, the data, one completion and its reward, memory, work, and
contradictions. It takes the flags of `fit` (see fit --help), trains nothing and writes nothing
(but a judge's reply into its cache). Exit code 0 if the run can start, 1 if not.

  --sample false   score a target instead of sampling one group
"""

INTERRUPTED = 128 + signal.SIGINT

_NOISE = (
    "litlogger",
    "GPU available",
    "TPU available",
    "HPU available",
    "💡 Tip",
    "Loaded model weights from the checkpoint",
)


def main(args: ArgsType = None) -> StatesetCLI | None:
    """Runs the command line; `args` replaces `sys.argv[1:]`, for tests and notebooks.

    Returns:
        What ran, with its `trainer`, `model` and `datamodule`. None without `args`: the shell would take it for an exit
        code.

    Raises:
        SystemExit: With code 2 for whatever the user can mend, after a message of a few lines on stderr; with 143 after
            SIGTERM and 130 after Ctrl-C; with 0 or 1 from `doctor`.
    """
    given = sys.argv[1:] if args is None else args
    if given in ([], ["-h"], ["--help"]):
        print(OVERVIEW, end="")
        raise SystemExit(0)
    words = given if isinstance(given, list) else []
    helps = bool({"-h", "--help"} & set(words))
    doctor = words[:1] == ["doctor"]
    if doctor and helps:
        print(DOCTOR, end="")
        raise SystemExit(0)
    try:
        if words[:1] == ["report"]:
            import_module("stateset_lightning.cli.report").main(words[1:])
            return None
        if words[:1] == ["convert"]:
            convert(words[1:])
            return None
        if words and words[0] in ("generate", "export"):
            if not helps:
                quieten()
            import_module(f"stateset_lightning.cli.{words[0]}").main(words[1:])
            return None
        check_config_files(words)
    except UserError as error:
        fail(str(error), code=1 if doctor else 2)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    if args is None:
        gc.disable()  # what is imported stays: looking for garbage in it takes a second of `fit --help`
    quieten()
    if os.getcwd() not in sys.path:  # a console script does not look beside the config for `my_rewards.ShortAndRight`
        sys.path.append(os.getcwd())
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from stateset_lightning.cli.config import StatesetCLI

    if args is None:
        gc.freeze()
        gc.enable()
    try:
        if doctor:
            import_module("stateset_lightning.cli.doctor").main(words[1:])
        cli = StatesetCLI(args)
        return None if args is None else cli
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as exit_:
        # The second Ctrl-C of a run: Lightning turns it into exit code 1.
        raise SystemExit(INTERRUPTED if isinstance(exit_.__context__, KeyboardInterrupt) else exit_.code) from None
    except (UserError, MisconfigurationException) as error:
        fail(without_traceback(str(error)), code=1 if doctor else 2)


def quieten() -> None:
    """Silences what libraries say at every start and no user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`gradient_checkpointing_enable` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_telling not in rank_zero.filters:
        rank_zero.addFilter(_is_telling)
    announcements = logging.getLogger("stateset_lightning")
    announcements.setLevel(logging.INFO)
    if not announcements.handlers:
        announcements.addHandler(_Stdout())


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"{PROGRAM}: error: {message.strip()}", file=sys.stderr)
    raise SystemExit(code)


class _Stdout(logging.Handler):
    """Prints announcements; on the stream of the moment, since a notebook or a test may have replaced `sys.stdout`."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def _is_telling(record: logging.LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in _NOISE)


if __name__ == "__main__":
    main()
