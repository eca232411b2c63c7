"""A policy loss of one's own, outside the package: `python examples/own_loss.py [STEPS]`.

A class with a formula is all it takes. Everything else (KL, entropy bonus, aggregation, mismatch correction, the
command line with its checks) comes with `Algorithm`. In a config, or with `PYTHONPATH=examples` on any command line,
the class is named by its path:

    stateset-lightning fit --config configs/single_turn.yaml --model.algorithm own_loss.TOPR
    --model.algorithm.truncation 0.5
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor

from stateset_lightning.algorithm import Algorithm, TokenBatch
from stateset_lightning.cli.main import main as command_line


class TOPR(Algorithm):
    """Tapered off-policy REINFORCE (arXiv:2503.14286), by token: right answers count whole, wrong ones no more than
    they are still likely.

    Args:
        truncation: Upper bound of the importance ratio where the advantage is negative.
    """

    def __init__(self, *, truncation: Annotated[float, Gt(0)] = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.truncation = truncation

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Any]]:
        advantages_T = self.advantages_per_token(tokens)
        ratio_T = (tokens.logprobs_T - tokens.old_logprobs_T).exp().detach()
        tapered_T = torch.where(advantages_T < 0, ratio_T.clamp(max=self.truncation), 1.0)
        # a sum and a count, added up over micro-steps and ranks
        metrics = {"policy/ratio_mean": (ratio_T.sum(), ratio_T.numel())}
        return -tapered_T * advantages_T * tokens.logprobs_T, metrics


def main(max_steps: int = 5) -> None:
    root = Path(__file__).parents[1]
    with TemporaryDirectory() as folder:
        command_line(
            [
                "fit",
                f"--config={root / 'configs' / 'single_turn.yaml'}",
                "--model.algorithm=own_loss.TOPR",
                "--model.algorithm.truncation=0.5",
                f"--data.train={root / 'examples' / 'arithmetic' / 'train.jsonl'}",
                f"--data.validation={root / 'examples' / 'arithmetic' / 'validation.jsonl'}",
                "--data.num_iterations=2",  # two passes over an episode: in the second the ratio differs from 1
                f"--trainer.max_steps={max_steps}",
                f"--trainer.logger.init_args.save_dir={folder}",
                "--baseline=false",
            ]
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
