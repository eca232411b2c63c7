"""What was computed of completions that have ended, for prompts that go on from them: a conversation's next turn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from stateset_lightning.policy.shared_prompts import SharedPrompts


@dataclass(frozen=True)
class Kept:
    """Keys and values of one row.

    Args:
        columns: Of each layer, [*, T, ...] as its kind of batch has them, one behind the other.
        prompts: Where the row's prompt lies, if `columns` are of what came behind it.
        prompt: Its number among them.
    """

    columns: list[Tensor]
    prompts: SharedPrompts | None = None
    prompt: int = 0

    @property
    def num_before(self) -> int:
        """Tokens of the row that come before its columns."""
        return 0 if self.prompts is None else int(self.prompts.lengths_P[self.prompt])

    def copied(self) -> "Kept":
        """With tensors of its own, which keep no batch alive."""
        return replace(self, columns=[tensor.clone() for tensor in self.columns])


def stacked(kept: Sequence[Kept], i: int, capacity: int, starts: Sequence[int] | None = None) -> Tensor:
    """The rows' columns `i`, of different T, as one tensor [B, *, capacity, ...]; zeros where a row has none.

    The rows lose them, so that the peak of memory is one tensor above what there was.

    Args:
        kept: A row may be there several times.
        i: Which tensor of `Kept.columns`.
        capacity: Columns that there is room for.
        starts: Column at which each row begins; None: all begin at the first.
    """
    first = kept[0].columns[i]
    made = first.new_zeros(len(kept), first.shape[0], capacity, *first.shape[2:])
    for place, row, start in zip(made, kept, starts or [0] * len(kept), strict=True):
        place[:, start : start + row.columns[i].shape[1]] = row.columns[i]
    for row in kept:
        row.columns[i] = first[:, :0].clone()
    return made
