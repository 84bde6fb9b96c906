"""Macro actions: runs of response tokens, numbered; from tokens to macro actions and back.

A macro action has no object of its own. `macro_ids` (B, T) holds the number of each token's action, and everything else
is scatter and gather along the token axis (`MacroActions`, and a function for each thing that may be asked once). The
axis M of macro actions is as long as T, its upper bound, so that nothing has to be counted on the host; actions that do
not exist are zero, and their length is 0.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apportion.masked import ranks

Pooling = Literal["equal", "unit", "position", "position_falling"]


def macro_ids(closes: Bool[Tensor, "B T"], response_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number the macro actions of each row.

    Every valid token has one number; the numbers of a row are 0, 1, 2, ... without gaps and never fall.

    Args:
        closes: (B, T) bool. True on tokens that close their action; ignored outside the response.
        response_mask: (B, T) bool. True on valid tokens, in any pattern.

    Returns:
        (B, T) int64. -1 outside the response.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.1.
    """
    before = torch.nn.functional.pad(closes & response_mask, (1, 0))[:, : closes.shape[1]]
    return torch.where(response_mask, before.cumsum(1), -1)


@dataclass(frozen=True, eq=False)
class MacroActions:
    """All macro actions of a batch; what is asked of them repeatedly is worked out once.

    On the way to them and back, the tokens outside the response have a slot of their own before the first action, which
    is cut off: that is quicker than to mask them out, and nothing that stands there can be heard.

    Attributes:
        ids: (B, T) int64. Macro action of each token, -1 outside the response.
    """

    ids: Int[Tensor, "B T"]

    def sum(self, x: Shaped[Tensor, "B T"]) -> Shaped[Tensor, "B M"]:
        """Sum a token quantity over each action; see `sum_over_actions`."""
        return x.new_zeros(len(x), x.shape[1] + 1).scatter_add_(1, self._slots, x)[:, 1:]

    def mean(self, x: Float[Tensor, "B T"]) -> Float[Tensor, "B M"]:
        """Average a token quantity over each action; 0 where no such action exists."""
        return self.sum(x) / self.lengths.clamp(min=1)

    def to_tokens(self, x: Shaped[Tensor, "B M"]) -> Shaped[Tensor, "B T"]:
        """Give each token the quantity of its action; see `to_tokens`."""
        return torch.nn.functional.pad(x, (1, 0)).gather(1, self._slots)

    @cached_property
    def lengths(self) -> Int[Tensor, "B M"]:
        """(B, M) int64. The tokens of each action; see `macro_lengths`."""
        return self.sum(torch.ones_like(self.ids))

    @cached_property
    def offsets(self) -> Int[Tensor, "B T"]:
        """(B, T) int64. The tokens before each token inside its own action; meaningless outside the response."""
        return ranks(self.ids >= 0) - self.to_tokens(self.lengths.cumsum(1) - self.lengths)

    def weights(self, pooling: Pooling) -> Float[Tensor, "B T"]:
        """Weigh the tokens of each action; see `pooling_weights`."""
        if pooling == "equal":
            return self.to_tokens(self.lengths.clamp(min=1).float().reciprocal())
        ahead = self.to_tokens(self.lengths) - self.offsets
        if pooling == "unit":
            return ((self.ids >= 0) & (ahead == 1)).float()
        if pooling not in ("position", "position_falling"):
            raise ValueError(f"pooling is {pooling!r}; choose 'equal', 'unit', 'position' or 'position_falling'")
        distance = ahead if pooling == "position" else self.offsets + 1
        weights = torch.where(self.ids >= 0, distance.clamp(min=1).float().reciprocal(), 0)
        return weights / self.to_tokens(self.sum(weights)).clamp(min=torch.finfo(torch.float32).tiny)

    @cached_property
    def _slots(self) -> Int[Tensor, "B T"]:
        return self.ids + 1


def sum_over_actions(x: Shaped[Tensor, "B T"], ids: Int[Tensor, "B T"]) -> Shaped[Tensor, "B M"]:
    """Sum a token quantity over each macro action.

    Args:
        x: (B, T) float or int. Outside the response it has no effect.
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, M) same dtype, M = T. 0 where no such action exists.
    """
    return MacroActions(ids).sum(x)


def to_tokens(x: Shaped[Tensor, "B M"], ids: Int[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
    """Give each token the quantity of its macro action.

    Args:
        x: (B, M) any dtype. One entry a macro action.
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, T) same dtype. 0 outside the response.
    """
    return MacroActions(ids).to_tokens(x)


def macro_lengths(ids: Int[Tensor, "B T"]) -> Int[Tensor, "B M"]:
    """Count the tokens of each macro action.

    Args:
        ids: (B, T) int64. Macro action of each token, -1 outside the response.

    Returns:
        (B, M) int64, M = T. 0 where no such action exists, so that `macro_lengths(ids) > 0` is the mask of actions.
    """
    return MacroActions(ids).lengths


def pooling_weights(ids: Int[Tensor, "B T"], pooling: Pooling) -> Float[Tensor, "B T"]:
    r"""Weigh the tokens of each macro action; the weights of an action sum to 1.

    With m tokens in the action, i = 0 .. m - 1 the place in it:

        equal              1 / m
        unit               1 on the last token
        position           (1 / (m - i)) / H,   H = sum_j 1 / (m - j): rises to the last token
        position_falling   (1 / (i + 1)) / H: falls from the first token

    Args:
        ids: (B, T) int64. Macro action of each token, -1 outside the response.
        pooling: Which of the four.

    Returns:
        (B, T) float32. 0 outside the response.

    Raises:
        ValueError: If the pooling is none of the four.

    Source:
        MA-RLHF, section 3.2 and appendix; `position_falling` is what its official code computes for `position`.
    """
    return MacroActions(ids).weights(pooling)
