"""Termination conditions: which tokens close a macro action.

A condition is called with a rollout and answers for the whole batch at once: (B, T) bool, True on closing tokens. The
last valid token of a row always closes. Any callable of that form will do; those below are also their own settings.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.batch import Rollout
from apportion.credit.row_keys import row_keys
from apportion.masked import compact, is_last, ranks


def _check_whole(name: str, number: object) -> None:
    """Refuse what cannot count tokens: 2.5 would close an action nowhere, True would pass for 1."""
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise ValueError(f"{name} is {number!r}, which counts no tokens; give a whole number, such as 5")


@dataclass(frozen=True)
class TerminationCondition(ABC):
    """Decide which tokens close a macro action; derive from it to choose a condition by name on the command line."""

    @abstractmethod
    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the tokens that close a macro action.

        Args:
            rollout: Sampled responses; the answer for a row depends on that row alone.

        Returns:
            (B, T) bool. False outside the response, True on the last valid token of each row.
        """


@dataclass(frozen=True)
class EveryToken(TerminationCondition):
    """Close after every token: token-level PPO."""

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark every valid token."""
        return rollout.response_mask.clone()


@dataclass(frozen=True)
class WholeResponse(TerminationCondition):
    """Close only at the end: the response is one action, as in a contextual bandit.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2, n = infinity.
    """

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the last valid token."""
        return is_last(rollout.response_mask)


@dataclass(frozen=True)
class FixedNgram(TerminationCondition):
    """Close after every n tokens; what is left at the end is a shorter last action.

    Attributes:
        n: Tokens of an action, a whole number of at least 1.

    Raises:
        ValueError: If n is not a whole number, or less than 1.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2: n = 5, and n = 10 for programs.
    """

    n: int = 5

    def __post_init__(self) -> None:
        """Refuse actions without tokens."""
        _check_whole("n", self.n)
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an n-gram has at least 1 token")

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark every n-th valid token, and the last."""
        mask = rollout.response_mask
        return mask & (ranks(mask) % self.n == self.n - 1) | is_last(mask)


@dataclass(frozen=True)
class RandomizedNgram(TerminationCondition):
    """Close after random numbers of tokens: the given lengths, each some times, shuffled for each row.

    After the lengths are used up the rest of the response is one action. The shuffle is a function of the seed and of
    the row's tokens (`row_keys`), so the same rollout always gives the same boundaries.

    Attributes:
        lengths: Tokens of an action, each at least 1.
        repeats: How often each length occurs, at least 1.
        seed: Another seed gives other shuffles.

    Raises:
        ValueError: If there is no length, or a length or `repeats` is not a whole number or less than 1.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2. Its official code has lengths (1, 2, 3, 5, 10).
    """

    lengths: tuple[int, ...] = (2, 3, 5, 10)
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse actions without tokens."""
        for name, number in (*(("lengths", length) for length in self.lengths), ("repeats", self.repeats)):
            _check_whole(name, number)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths is {self.lengths}; give at least one length, each at least 1")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; each length occurs at least once")

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the ends of the shuffled lengths, and the last valid token."""
        mask = rollout.response_mask
        # Filled on the device: to copy a list there would wait for it.
        deck = torch.cat([mask.new_full((self.repeats,), length, dtype=torch.long) for length in self.lengths])
        total = sum(self.lengths) * self.repeats
        ends = deck[row_keys(rollout, len(deck), self.seed).argsort(1)].cumsum(1)
        is_end = mask.new_zeros(len(mask), total + 2).scatter(1, ends, True)
        return mask & is_end.gather(1, (ranks(mask) + 1).clamp(0, total + 1)) | is_last(mask)


@dataclass(frozen=True)
class Perplexity(TerminationCondition):
    """Close before a token that is harder to foresee, by the reference model's log-probabilities.

    With s_t = -ref_logprobs[t], a new action begins at t when

        token     s_t > s_{t-1}
        segment   s_t > mean of s over the current action: adding t would raise the action's perplexity

    Attributes:
        variant: Which of the two.
        early: Close one token before that, as the official code does when it is fed what it expects (for parity only;
            variant `token`).

    Raises:
        ValueError: If the variant is neither of the two, or `early` is asked of `segment`.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2: its listing is `token`, its wording `segment`.
    """

    variant: Literal["token", "segment"] = "token"
    early: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.variant not in ("token", "segment"):
            raise ValueError(f"variant is {self.variant!r}; choose 'token' or 'segment'")
        if self.early and self.variant == "segment":
            raise ValueError("early is True with variant 'segment'; the official code has only variant 'token'")

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the tokens before which surprise is about to rise, and the last valid token."""
        mask = rollout.response_mask
        surprise = compact(-rollout.ref_logprobs.float(), mask)
        count = mask.sum(1, keepdim=True)
        opens = _rises(surprise, count) if self.variant == "token" else _mean_rises(surprise, count)
        closes = torch.nn.functional.pad(opens, (0, 2))[:, 2 if self.early else 1 :][:, : mask.shape[1]]
        return mask & closes.gather(1, ranks(mask).clamp(min=0)) | is_last(mask)


@dataclass(frozen=True)
class ShuffledBoundaries(TerminationCondition):
    """Close as many actions as another condition does, at random tokens: the control that keeps all but the places.

    The permutation is a function of the seed and of the row's tokens (`row_keys`). The last valid token still closes.

    Attributes:
        inner: The condition whose boundaries are permuted.
        seed: Another seed gives other permutations.

    Source:
        Control for MA-RLHF (https://arxiv.org/abs/2410.02743): does it matter where macro actions end?
    """

    inner: TerminationCondition
    seed: int = 0

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Permute the inner boundaries over the valid tokens but the last."""
        mask = rollout.response_mask
        last = is_last(mask)
        free, place = mask & ~last, ranks(mask).clamp(min=0)
        keys = row_keys(rollout, mask.shape[1], self.seed).gather(1, place)
        order = torch.where(free, keys, torch.iinfo(torch.int64).max).argsort(1)
        closes = self.inner(rollout).gather(1, order.gather(1, place))
        return free & closes | last


def _rises(surprise: Float[Tensor, "B T"], count: Int[Tensor, "B 1"]) -> Bool[Tensor, "B T"]:
    """Mark the tokens that are harder to foresee than the one before."""
    columns = torch.arange(surprise.shape[1], device=surprise.device)
    previous = torch.nn.functional.pad(surprise, (1, 0))[:, : surprise.shape[1]]
    return (surprise > previous) & (columns > 0) & (columns < count)


def _mean_rises(surprise: Float[Tensor, "B T"], count: Int[Tensor, "B 1"]) -> Bool[Tensor, "B T"]:
    """Mark where actions begin when each ends before the token that exceeds its mean.

    Blocks of 1, 2, 4, ... tokens are segmented as if each began a row, and merged in pairs. The beginnings found in the
    right block stay, but for those up to the first that exceeds the mean of the action which the left block leaves
    open. That is exact: inside an action of the right block the mean only falls from the first token on, and if that
    token did not exceed the open action's mean, then the open action's mean stays the higher, and no token exceeds it.

    Sums of float32 numbers are exact in float64, so that equal surprises never differ by rounding. Time is the first
    axis here, which keeps blocks of one token as quick as long ones.
    """
    rows, width = surprise.shape
    length = 1 << max(width - 1, 0).bit_length()
    exact = torch.nn.functional.pad(surprise.double(), (0, length - width)).T.contiguous()
    before = exact.cumsum(0) - exact
    columns = torch.arange(length, dtype=torch.double, device=surprise.device)[:, None]
    line = exact * columns - before  # s_t (t - i) > P_t - P_i, with the terms of t alone on one side
    begins = (length - columns).repeat(1, rows)  # counted from the end, so that the first is the largest; 0 is none
    opened, span = columns.repeat(1, rows), 1  # the last beginning in each block
    while span < length:
        pairs = (length // span // 2, 2, span, rows)
        left, own = opened.view(pairs[0], 2, rows).unbind(1)
        right, slope, height = (x.view(pairs)[:, 1] for x in (begins, exact, line))
        rises = height + before.gather(0, left.long())[:, None] > slope * left[:, None]
        first = (right * rises).amax(1)
        right *= right <= first[:, None]
        opened = torch.where(first > 0, own, left)
        span *= 2
    return (begins[:width].T > 0) & (torch.arange(width, device=surprise.device) < count)
