"""Termination conditions: which tokens close a macro action.

A condition is called with a rollout and answers for the whole batch at once: (B, T) bool, True on closing tokens. The
last valid token of a row always closes. Any callable of that form will do; those below are also their own settings.
Conditions that read text are in `delimiter` and in the package `parsing`.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.batch import Rollout
from apportion.checks import call_error, check_instance, is_number, is_whole
from apportion.credit.macro_actions import macro_ids, macro_lengths
from apportion.credit.mean_rises import mean_rises
from apportion.credit.row_keys import check_seed, orders, row_keys
from apportion.masked import Packing


def check_whole(name: str, number: object) -> None:
    """Refuse what cannot count tokens: 2.5 would close an action nowhere, True would pass for 1."""
    if not is_whole(number):
        raise ValueError(f"{name} is {number!r}, which counts no tokens; give a whole number, such as 5")


def check_condition(name: str, condition: object) -> None:
    """Refuse what cannot be called with a rollout alone.

    Raises:
        ValueError: If it is no callable, or a class, or takes other arguments, or is a parser.
    """
    check_instance(name, condition)
    if not callable(condition):
        raise ValueError(f"{name} is {condition!r}; give a callable (rollout) -> (B, T) bool, such as FixedNgram(n=5)")
    if error := call_error(condition, None):
        message = f"{name} is {condition!r}, which takes other arguments ({error}); give a callable (rollout) -> (B, T)"
        raise ValueError(f"{message} bool, such as FixedNgram(n=5)") from error
    if _reads_text(condition):
        raise ValueError(f"{name} is {condition!r}, a parser; give ConstituencyParse(backend=...) with it")


def _reads_text(function: Callable) -> bool:
    """Tell whether the first argument of a callable is said to be a text."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except ValueError:  # not written in Python
        return False
    return any(argument.annotation in (str, "str") for argument in [*arguments][:1])


def closes_of(condition: Callable[[Rollout], object], rollout: Rollout) -> Bool[Tensor, "B T"]:
    """Ask a condition, which may be anybody's.

    Raises:
        ValueError: If it answers in another form than (B, T) bool.
    """
    closes, shape = condition(rollout), rollout.response_mask.shape
    if not isinstance(closes, Tensor):
        raise ValueError(f"what the termination returned is {closes!r}; return (B, T) bool, here {tuple(shape)}")
    if closes.dtype != torch.bool or closes.shape != shape:
        answer = f"has dtype {closes.dtype} and shape {tuple(closes.shape)}"
        raise ValueError(f"what the termination returned {answer}; return (B, T) bool, here {tuple(shape)}")
    return closes


IMPOSSIBLE = 1e6
"""Nats that stand for an infinite surprise in a mean: more than any other, and sums with it are still told apart."""

_REMEDIES = {
    "text": "add it with apportion.with_text(rollout, tokenizer)",
    "entropies": "gather them while sampling, and give them to Rollout",
}


@dataclass(frozen=True)
class TerminationCondition(ABC):
    """Decide which tokens close a macro action; derive from it to choose a condition by name on the command line."""

    @property
    def needs(self) -> frozenset[str]:
        """What the rollout has to hold besides tokens and log-probabilities: any of "text" and "entropies"."""
        return frozenset()

    def check(self, rollout: Rollout) -> None:
        """Refuse a rollout without what `needs` names.

        Args:
            rollout: Sampled responses.

        Raises:
            ValueError: If something is missing; it says how to add it.
        """
        for name in sorted(self.needs):
            if getattr(rollout, name) is None:
                raise ValueError(f"{type(self).__name__} needs Rollout.{name}, which is None; {_REMEDIES[name]}")

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
        return rollout.packing.last


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
        check_whole("n", self.n)
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an n-gram has at least 1 token")

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark every n-th valid token, and the last."""
        packing = rollout.packing
        width = packing.mask.shape[1]
        opens = torch.arange(width, device=packing.mask.device) % min(self.n, width + 1) == 0
        return _closing_before(opens.expand_as(packing.mask), packing)


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
        if not isinstance(self.lengths, Iterable):
            raise ValueError(f"lengths is {self.lengths!r}; give several whole numbers, such as (2, 3, 5, 10)")
        check_seed(self.seed)
        for name, number in (*(("lengths", length) for length in self.lengths), ("repeats", self.repeats)):
            check_whole(name, number)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths is {self.lengths}; give at least one length, each at least 1")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; each length occurs at least once")

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the ends of the shuffled lengths, and the last valid token."""
        mask, packing = rollout.response_mask, rollout.packing
        # Filled on the device: to copy a list there would wait for it.
        last = min(sum(self.lengths) * self.repeats, mask.shape[1]) + 1  # no end behind it is looked up
        counts = [mask.new_full((self.repeats,), min(length, last), dtype=torch.long) for length in self.lengths]
        deck = torch.cat(counts)
        ends = deck[row_keys(rollout, len(deck), self.seed, stream=1).argsort(1)].cumsum(1).clamp_(max=last)
        is_end = mask.new_zeros(len(mask), last + 1).scatter_(1, ends, mask.new_ones(ends.shape))
        places = (packing.ranks + 1).clamp_(max=last).expand_as(mask)
        return mask & is_end.gather(1, places) | packing.last


@dataclass(frozen=True)
class Perplexity(TerminationCondition):
    """Close before a token that is harder to foresee, by the reference model's log-probabilities.

    With s_t = -ref_logprobs[t], a new action begins at t when

        token     s_t > s_{t-1}
        segment   s_t > mean of s over the current action: adding t would raise the action's perplexity

    In a mean a surprise counts as 1e6 nats at most, an infinite one too. Sums are exact for float32 numbers that are
    less than a million times apart; beyond that, a token that equals the mean may be taken to exceed it.

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
        packing = rollout.packing
        surprise = packing.pack(-rollout.ref_logprobs.float())
        opens = _rises(surprise) if self.variant == "token" else mean_rises(surprise.clamp_(max=IMPOSSIBLE))
        if self.early:
            opens = torch.nn.functional.pad(opens & packing.packed_mask, (0, 1))[:, 1:]
        return _closing_before(opens, packing)


@dataclass(frozen=True)
class Entropy(TerminationCondition):
    """Close before a token that was drawn from a distribution of high entropy: there the policy had a choice.

        a new action begins at t when    -sum_v p_v log p_v > threshold,    p the distribution that was sampled at t

    Attributes:
        threshold: In nats, at least 0. At 0 nearly every token is an action, beyond log V the response is one.

    Raises:
        ValueError: If the threshold is not a number of at least 0.

    Source:
        Yin et al., 2025 (https://arxiv.org/abs/2501.02790): 1.75 for phi-3, 2 for Llama-3; of the sampled distribution,
        cut by top-k and top-p where these are set. There, segments end at such a token; here they begin with it.
    """

    threshold: float = 1.75

    def __post_init__(self) -> None:
        """Refuse what is no entropy."""
        if not (is_number(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold is {self.threshold!r}; choose a number of at least 0, in nats, such as 1.75")

    @property
    def needs(self) -> frozenset[str]:
        """The entropies of the sampled distributions."""
        return frozenset({"entropies"})

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the tokens before which the policy was unsure, and the last valid token."""
        self.check(rollout)
        assert rollout.entropies is not None  # checked above; for the type checker
        packing = rollout.packing
        return _closing_before(packing.pack(rollout.entropies > self.threshold), packing)


@dataclass(frozen=True)
class LowProbability(TerminationCondition):
    """Close before a token that the sampling policy held for unlikely.

        a new action begins at t when    exp(old_logprobs_t) < threshold

    Attributes:
        threshold: Probability, in [0, 1]. At 0 the response is one action, at 1 nearly every token is.

    Raises:
        ValueError: If the threshold is no probability.

    Source:
        SAE (https://arxiv.org/abs/2601.07320) cuts where the sampled token's probability is low; SPO's code counts
        tokens below 0.9.
    """

    threshold: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not (is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise ValueError(f"threshold is {self.threshold!r}; choose a probability in [0, 1], such as 0.2")

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the tokens before which an unlikely one was drawn, and the last valid token."""
        least = math.log(self.threshold) if self.threshold else -math.inf
        packing = rollout.packing
        return _closing_before(packing.pack(rollout.old_logprobs < least), packing)


def _closing_before(opens: Bool[Tensor, "B T"], packing: Packing) -> Bool[Tensor, "B T"]:
    """Mark the tokens before those that open, which are packed; what is behind the last one opens too."""
    closes = torch.nn.functional.pad(opens | ~packing.packed_mask, (0, 1), value=True)[:, 1:]
    return packing.mask & packing.unpack(closes)


@dataclass(frozen=True)
class ShuffledBoundaries(TerminationCondition):
    """Close actions as long as those of another condition, in random order: the control that keeps all but the places.

    The permutation is a function of the seed and of the row's tokens (`row_keys`). Over fixed n-grams it moves only
    their shorter last one: it asks something of conditions that read the response.

    Attributes:
        inner: The condition whose actions are permuted; one of ours, or any callable.
        seed: Another seed gives other permutations; the same one as in `Shuffled` draws the same.

    Raises:
        ValueError: If `inner` is no condition.

    Source:
        Control for MA-RLHF (https://arxiv.org/abs/2410.02743): does it matter where macro actions end?
    """

    inner: TerminationCondition | Callable
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        check_condition("inner", self.inner)
        check_seed(self.seed)

    @property
    def needs(self) -> frozenset[str]:
        """What the inner condition needs."""
        return getattr(self.inner, "needs", frozenset())

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the ends of the permuted actions."""
        mask = rollout.response_mask
        ids = macro_ids(closes_of(self.inner, rollout), mask)
        lengths = macro_lengths(ids)
        if ids.numel() and ids.device.type == "cpu":  # elsewhere to look how many there are would be to wait for it
            lengths = lengths[:, : int(ids.amax()) + 1]
        # What does not exist comes last and is of length 0: it ends where the last action does.
        ends = lengths.gather(1, orders(rollout, self.seed, lengths.bool())).cumsum(1)
        closes = mask.new_zeros(len(mask), mask.shape[1] + 1).scatter_(1, ends, True)[:, 1:]
        return mask & rollout.packing.unpack(closes)


def _rises(surprise: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Mark the tokens that are harder to foresee than the one before; without meaning in the filling."""
    previous = torch.nn.functional.pad(surprise, (1, 0), value=math.inf)[:, : surprise.shape[1]]
    return surprise > previous
