"""stateset-lightning doctor: what a config amounts to, before a long run.

usage: stateset-lightning doctor --config FILE [--config OVERLAY] [--KEY VALUE] ... [--sample false]

It shows the config without defaults, the data, one completion or conversation and its reward, seconds and peak memory
of an episode, and contradictions. It takes the flags of `fit` (see fit --help) and writes nothing (but replies of a
judge or a simulated user into their cache, and what an environment writes). Exit code 0 if the run can start, 1 if not.

  --sample false   score a target instead of sampling; the worst case is measured without sampling
"""

# The text above is what `doctor --help` prints, without importing torch.

from collections.abc import Sequence


def main(words: Sequence[str]) -> None:
    """Runs the command with the words that follow it.

    Raises:
        SystemExit: With code 0 or 1.
        UserError: If the command line or the config cannot be read.
    """
    if {"-h", "--help"} & set(words):
        print(__doc__, end="")
        raise SystemExit(0)
    from stateset_lightning.cli.early_checks import checked_words

    merged = checked_words("fit", words)
    from stateset_lightning.cli.doctor.sections import Doctor

    Doctor(["fit", *words], merged)
