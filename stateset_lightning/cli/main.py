"""stateset-lightning: GRPO for language tasks that can be scored.

usage: stateset-lightning {fit,validate,test,predict} --config FILE [--config OVERLAY] [--KEY VALUE] ...

  fit        train, and validate on the way
  validate   greedy answers to data.validation, scored
  test       greedy answers to data.test, scored
  predict    greedy answers to data.predict, written as JSON lines
  generate   try a checkpoint on a prompt, or in a conversation: generate --ckpt_path CKPT [--prompt TEXT]
  export     a plain Hugging Face folder with a model card: export CKPT OUT [--merge] [--push REPO]
  report     one HTML page about a run: report RUN [-o FILE]
  convert    the guide's YAML, single-turn or multi-turn, to a config: convert GUIDE [-o FILE]
  doctor     before a long run: data, one reward, memory and time, contradictions: doctor --config FILE

Every key of a config is a flag as well (--trainer.max_steps 100), and wins over the files. Of several files, the later
one wins.
  stateset-lightning fit --config configs/single_turn.yaml
  stateset-lightning fit --config configs/single_turn.yaml --print_config   the resolved config, without running it
  stateset-lightning fit --config FILE --ckpt_path CHECKPOINT               resume
  stateset-lightning fit --help                                             all keys
  stateset-lightning --version
"""

# The text above is what `--help` prints. An error that the user can mend is reported in a few lines; any other keeps
# its traceback. Lightning and torch are imported only by commands that need them.

import gc
import logging
import os
import re
import signal
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from stateset_lightning.cli import program

if TYPE_CHECKING:
    from stateset_lightning.cli.config import StatesetCLI

# Those that are not LightningCLI's: each is the `main` of its file, called with the words behind it.
COMMANDS = ("convert", "doctor", "export", "generate", "report")

LIGHT = ("convert", "report")  # those of them that load no model

_WARNINGS = (
    ".*(LightningCLI's args parameter is intended|does not have many workers|isinstance.treespec, LeafSpec"
    "|`gradient_checkpointing_enable` is deprecated)"
)
_NOISE = re.compile("litlogger|[GTH]PU available|💡 Tip|Loaded model weights from the checkpoint")


def main(args: list[str] | None = None) -> "StatesetCLI | None":
    """Runs the command line; `args` replaces `sys.argv[1:]`, for tests and notebooks.

    Returns:
        What ran, with its `trainer`, `model` and `datamodule`. None without `args`, as the shell would take it for an
        exit code, and for commands that train and evaluate nothing.

    Raises:
        SystemExit: With code 2 for whatever the user can mend, after a message of a few lines on stderr; with 143 after
            SIGTERM, 130 after Ctrl-C and 129 after SIGHUP; with 0 or 1 from `doctor`.
    """
    if args is not None:
        return _run(args)
    program.begin()
    try:
        _run(sys.argv[1:], is_program=True)
        return None
    except SystemExit as exit_:
        if exit_.code in program.EXIT_CODES:
            program.leave(int(exit_.code))
        raise


def _run(words: list[str], is_program: bool = False) -> "StatesetCLI | None":
    from stateset_lightning.cli.arguments import with_flags
    from stateset_lightning.cli.messages import PROGRAM, without_traceback
    from stateset_lightning.errors import CheckpointError, UserError
    from stateset_lightning.files import forget_inputs
    from stateset_lightning.redaction import redact_streams, remember_flags
    from stateset_lightning.threads import heartbeat

    if words in ([], ["-h"], ["--help"], ["--version"]):
        print(f"{PROGRAM} {version(PROGRAM)}\n" if words == ["--version"] else __doc__, end="")
        raise SystemExit(0)
    command = words[0]
    redact_streams()
    forget_inputs()
    remember_flags(words)
    if os.getcwd() not in sys.path:  # a console script does not look beside the config for `my_rewards.ShortAndRight`
        sys.path.append(os.getcwd())
    # Not into a config or an answer that is written to a file.
    if command not in LIGHT and not sys.stdout.isatty() and not any("--print_config" in word for word in words):
        heartbeat.start(command, sys.stderr if command == "generate" else sys.stdout)
    try:
        if command not in COMMANDS:
            return _run_lightning(words, is_program)
        if command not in LIGHT and not {"-h", "--help"} & set(words):
            quieten()
        import_module(f"stateset_lightning.cli.{command}").main(words[1:])
        return None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except UserError as error:
        is_of_flags = command in ("generate", "export") and not isinstance(error, CheckpointError)
        said = with_flags(str(error)) if is_of_flags else str(error)
        print(f"{PROGRAM}: error: {without_traceback(said).strip()}", file=sys.stderr)
        raise SystemExit(1 if command == "doctor" else 2) from None
    finally:
        heartbeat.stop()


def _run_lightning(words: list[str], is_program: bool) -> "StatesetCLI":
    from stateset_lightning.cli.early_checks import SPLITS, checked_words
    from stateset_lightning.errors import ConfigError

    if words[0] not in SPLITS:
        raise ConfigError(f"there is no command {words[0]}; it comes first: {', '.join([*SPLITS, *COMMANDS])}")
    merged = checked_words(words[0], words[1:])
    if is_program:
        gc.disable()  # what is imported stays: looking for garbage in it takes a second of `fit --help`
    quieten()
    from stateset_lightning.cli.config import StatesetCLI

    if is_program:
        gc.freeze()
        gc.enable()
    return StatesetCLI(words, merged)


def quieten() -> None:
    """Silences what libraries say at every start and no user can act on; before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # a notebook's; otherwise it will obey the variable
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=_WARNINGS)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_telling)
    announcements = logging.getLogger("stateset_lightning")
    announcements.setLevel(logging.INFO)
    if not announcements.handlers:
        announcements.addHandler(_Stdout())


class _Stdout(logging.Handler):
    """Prints announcements; on the stream of the moment, since a notebook or a test may have replaced `sys.stdout`."""

    def emit(self, record: logging.LogRecord) -> None:
        from stateset_lightning.threads import heartbeat

        heartbeat.say(record.getMessage())


def _is_telling(record: logging.LogRecord) -> bool:
    return not _NOISE.search(record.getMessage())
