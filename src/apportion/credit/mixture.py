"""Redistributions that are made of others: mixtures, and the control that only permutes."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.batch import Needs, Rollout, Scores
from apportion.checks import is_number
from apportion.credit.redistribution import Redistribution, check_redistribution, needs_of, place, shares_of
from apportion.credit.row_keys import check_seed, permutations
from apportion.masked import is_last, zero_outside


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A redistribution and its weight in a mixture.

    Attributes:
        redistribution: One of ours, or any callable `(rollout, scores, *, gamma, steps) -> (B, T)`; on the command line
            a class or function by its dotted path.
        weight: At least 0.

    Raises:
        ValueError: If the weight is negative or not a number, or the redistribution cannot be called as one.
    """

    redistribution: Redistribution | Callable
    weight: float

    def __post_init__(self) -> None:
        """Refuse what can be no part of a mixture."""
        check_redistribution(self.redistribution)
        if not (is_number(self.weight) and 0 <= self.weight < math.inf):
            raise ValueError(f"weight is {self.weight!r}; choose a number of at least 0")


@dataclass(frozen=True)
class Mixture(Redistribution):
    """Pay the weighted mean of what several redistributions pay.

        token_level_scores_t = sum_i weight_i * token_level_scores_t of part i,      sum_i weight_i = 1

    Causal if all parts are (a weighted sum of potentials of the prefix is one), else retrospective. Row sums, and with
    gamma < 1 discounted sums, are the weighted means of those of the parts, so they are kept where the parts keep them.

    Attributes:
        parts: Redistributions with their weights, which sum to 1; as `Weighted`, or as a mapping to weights.

    Raises:
        ValueError: If there is no part, the weights do not sum to 1 up to 1e-6, or two parts need different attention
            of one model.

    Source:
        ABC (https://arxiv.org/abs/2402.00782) mixes with `Terminal`: its beta is a weight.
    """

    parts: tuple[Weighted, ...]

    def __post_init__(self) -> None:
        """Refuse weights that do not sum to 1."""
        given: Any = self.parts
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise ValueError(f"parts is {given!r}; give redistributions with weights, such as {{Attention(): 1.0}}")
        object.__setattr__(self, "parts", self.of(given).parts if isinstance(given, Mapping) else tuple(given))
        if not self.parts:
            raise ValueError("parts is empty; give redistributions with weights that sum to 1")
        if bad := [part for part in self.parts if not isinstance(part, Weighted)]:
            raise ValueError(
                f"parts holds {bad[0]!r}; give Weighted(redistribution=..., weight=...), or Mixture.of({{...: weight}})"
            )
        total = math.fsum(part.weight for part in self.parts)
        if abs(total - 1) > 1e-6:
            weights = ", ".join(f"{part.weight}" for part in self.parts)
            raise ValueError(f"the weights of parts are {weights} and sum to {total}; make them sum to 1")
        _ = self.needs

    @classmethod
    def of(cls, weights: Mapping[Redistribution | Callable, float]) -> Self:
        """Write a mixture as a mapping: `Mixture.of({Attention(): 0.7, Uniform(): 0.3})`."""
        return cls(tuple(Weighted(redistribution=kind, weight=weight) for kind, weight in weights.items()))

    @property
    def needs(self) -> Needs:
        """What any part needs."""
        return reduce(or_, (needs_of(part.redistribution) for part in self.parts))

    @property
    def causal(self) -> bool:
        """Whether all parts are."""
        return all(getattr(part.redistribution, "causal", False) for part in self.parts)

    @property
    def weight(self) -> float:
        """What the parts spread together."""
        return math.fsum(part.weight * _weight_of(part.redistribution) for part in self.parts)

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Mix what the parts spread, without what they leave at the end."""
        spread = torch.zeros(rollout.response_mask.shape, device=rollout.response_mask.device)
        for part in self.parts:
            shares, weight = shares_of(part.redistribution, rollout, scores)
            spread = spread + part.weight * weight * shares
        return spread / (self.weight or 1.0)

    def __call__(
        self, rollout: Rollout, scores: Scores, *, gamma: float = 1.0, steps: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T"]:
        """Spread the scores over the tokens; see `Redistribution.__call__`."""
        self._check(rollout, scores)
        placed = torch.zeros(rollout.response_mask.shape, device=rollout.response_mask.device)
        for part in self.parts:
            placed = placed + part.weight * place(part.redistribution, rollout, scores, gamma=gamma, steps=steps)
        return placed


@dataclass(frozen=True)
class Shuffled(Redistribution):
    """Permute what another redistribution spreads, inside each row: the control that keeps all but the places.

    The part that stays on the last token stays there, also where a mixture leaves it, and so do the shares of a row
    that all lie there: those of `Terminal`, or of attention where there is none. The permutation is a function of the
    seed and of the row's tokens (`permutations`). Retrospective: a token's place is drawn for the whole response at
    once.

    With gamma < 1 the shares are permuted before they are discounted to the end, as those of `Attention` are: a row's
    discounted sum is gamma^(n-1) times its sum. For `PrefixDifference` that is gamma^(n-1) * (R - beta * p_0), while
    the original has gamma^(n-1) * R - beta * p_0: compare the two at gamma = 1, or with `from_prompt=False`.

    Attributes:
        inner: The redistribution whose shares are permuted, or any callable.
        seed: Another seed gives other permutations.

    Source:
        Control 3 for ABC (https://arxiv.org/abs/2402.00782): is it the attention, or merely dense reward?
    """

    inner: Redistribution | Callable
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no redistribution."""
        check_redistribution(self.inner)
        check_seed(self.seed)

    @property
    def needs(self) -> Needs:
        """What the inner redistribution needs."""
        return needs_of(self.inner)

    @property
    def weight(self) -> float:
        """The weight of the inner redistribution; a callable of a user's is permuted whole."""
        return _weight_of(self.inner)

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Permute the inner shares over the valid tokens."""
        mask, (shares, _) = rollout.response_mask, shares_of(self.inner, rollout, scores)
        spread = (mask & ~is_last(mask) & (shares != 0)).any(1, keepdim=True)
        return zero_outside(torch.where(spread, shares.gather(1, permutations(rollout, self.seed)), shares), mask)


def _weight_of(redistribution: Redistribution | Callable) -> float:
    """The part of the score that is spread: of a callable of a user's, all."""
    return redistribution.weight if isinstance(redistribution, Redistribution) else 1.0
