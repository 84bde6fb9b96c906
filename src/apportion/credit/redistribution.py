r"""Redistributions: where the score of a response lands.

A redistribution spreads `scores[b]` over the tokens of row b. All but `PrefixDifference` are mixtures

    token_level_scores_t = beta * gamma^(n - t) * share_t + (1 - beta) * R * [t = n],      sum_t share_t = R

with n the last valid token, and `n - t` counted in steps of discounting. So with gamma = 1 each row sums to its score,
and with gamma < 1 its discounted sum is the one that the score at the end would give (abc.md C1 in the design notes:
without the factor, early tokens would be paid more than the score is worth).

Is it fair to the policy? A redistribution is *causal* when the sum paid so far is a function of the prefix: it is then
potential-based shaping, and leaves the order of actions in every state as it was. It is *retrospective* when what a
token is paid depends on what came later: the return of a whole response is kept, but reward-to-go is not
(docs/method.md). Each class says which it is, and `causal` says it to programs.

Those that follow attention are in `credit.attention`, those that are made of others in `credit.mixture`. Any callable
of the same signature can stand in the place of one (`place`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.batch import NOTHING, Needs, Rollout, Scores
from apportion.checks import call_error, check_instance, check_unit_interval
from apportion.masked import is_last, ranks, zero_outside


@dataclass(frozen=True)
class Redistribution(ABC):
    """Spread the score of each response over its tokens; derive from it to choose one by name on the command line."""

    @property
    def needs(self) -> Needs:
        """What has to be supplied besides the scores."""
        return NOTHING

    @property
    def causal(self) -> bool:
        """Whether the sum paid up to each token is a function of the prefix up to there."""
        return False

    @property
    def weight(self) -> float:
        """The part of the score that is spread; the rest stays on the last token."""
        return 1.0

    @abstractmethod
    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Say how much of the score each token earned, before mixing and discounting.

        Args:
            rollout: The responses.
            scores: Their scores, with what `needs` names.

        Returns:
            (B, T) float32. 0 outside the response.
        """

    def __call__(
        self, rollout: Rollout, scores: Scores, *, gamma: float = 1.0, steps: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T"]:
        """Spread the scores over the tokens.

        Args:
            rollout: The responses.
            scores: Their scores, with what `needs` names.
            gamma: Discount of a step.
            steps: (B, T) int64. The step in which each token is paid; by default every token is a step.

        Returns:
            (B, T) float32. 0 outside the response.

        Raises:
            ValueError: If `scores` lacks what `needs` names, or its shape does not fit the responses.
        """
        self._check(rollout, scores)
        mask = rollout.response_mask
        if self.weight == 0.0:
            return at_end(scores.scores, mask)
        spread = self.shares(rollout, scores) * _discount_to_end(mask, gamma, steps)
        if self.weight == 1.0:
            return spread
        return self.weight * spread + (1 - self.weight) * at_end(scores.scores, mask)

    def _check(self, rollout: Rollout, scores: Scores) -> None:
        """Refuse scores without what this redistribution reads."""
        rows, tokens = rollout.response_mask.shape
        if len(scores.scores) != rows:
            raise ValueError(f"scores has {len(scores.scores)} entries; there are {rows} responses, score each")
        for name in self.needs.names:
            tensor, wanted = getattr(scores, name), (rows, tokens + (name == "prefix_scores"))
            if tensor is None:
                source = "read it off the policy" if name == "policy_attention" else "ask the reward for it"
                raise ValueError(f"{type(self).__name__} needs Scores.{name}, which is None; {source}")
            if tensor.shape != wanted:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the responses need {wanted}")


def place(
    redistribution: Redistribution | Callable,
    rollout: Rollout,
    scores: Scores,
    *,
    gamma: float = 1.0,
    steps: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Spread scores by a redistribution of ours or by any callable of the same signature.

    Args:
        redistribution: Called as `redistribution(rollout, scores, gamma=gamma, steps=steps)`.
        rollout: The responses.
        scores: Their scores, with what `needs` names.
        gamma: Discount of a step.
        steps: (B, T) int64. The step in which each token is paid; by default every token is a step.

    Returns:
        (B, T) float32. What a user's callable says outside of the response is dropped.

    Raises:
        ValueError: If a callable answers in another form than (B, T) float.
    """
    placed = redistribution(rollout, scores, gamma=gamma, steps=steps)
    if isinstance(redistribution, Redistribution):
        return placed
    mask = rollout.response_mask
    if not isinstance(placed, Tensor) or not placed.is_floating_point() or placed.shape != mask.shape:
        answer = f"{placed.dtype} {tuple(placed.shape)}" if isinstance(placed, Tensor) else type(placed).__name__
        raise ValueError(f"the redistribution returned {answer}; return (B, T) float, here {tuple(mask.shape)}")
    return zero_outside(placed, mask)


def needs_of(redistribution: Redistribution | Callable) -> Needs:
    """Say what a redistribution needs besides the scores; a user's callable may have an attribute `needs`."""
    return getattr(redistribution, "needs", NOTHING)


def shares_of(
    redistribution: Redistribution | Callable, rollout: Rollout, scores: Scores
) -> tuple[Float[Tensor, "B T"], float]:
    """Ask a redistribution what it spreads, apart from what it leaves on the last token.

    Args:
        redistribution: Of ours; or any callable, of which all that it pays is taken for spread.
        rollout: The responses.
        scores: Their scores, with what the redistribution needs.

    Returns:
        shares: (B, T) float32. How much of the score each token earned, before mixing and discounting.
        weight: The part of the score that is spread.

    Raises:
        ValueError: If `scores` lacks what the redistribution needs, or a callable answers in another form.
    """
    if not isinstance(redistribution, Redistribution):
        return place(redistribution, rollout, scores), 1.0
    redistribution._check(rollout, scores)
    return redistribution.shares(rollout, scores), redistribution.weight


def check_redistribution(redistribution: object) -> None:
    """Refuse what cannot be called as a redistribution, before any work.

    Raises:
        ValueError: If it is a class or its name, or not callable as `redistribution(rollout, scores, gamma=...,
            steps=...)`, or its `needs` are of another kind.
    """
    check_instance("redistribution", redistribution)
    name = getattr(redistribution, "__name__", type(redistribution).__name__)
    error = call_error(redistribution, None, None, gamma=1.0, steps=None)
    if error or not callable(redistribution):
        call = "(rollout, scores, *, gamma, steps)"
        raise ValueError(f"{name} is no redistribution ({error}); give a callable {call} -> (B, T)") from error
    if not isinstance(needs_of(redistribution), Needs):
        raise ValueError(f"{name}.needs is {needs_of(redistribution)!r}; give it an apportion.Needs")


def at_end(scores: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Put each score on the last valid token of its row.

    Args:
        scores: (B) float.
        mask: (B, T) bool. True on valid tokens; a row without any gets nothing.

    Returns:
        (B, T) float32.
    """
    return zero_outside(scores.float()[:, None], is_last(mask))


def _discount_to_end(mask: Bool[Tensor, "B T"], gamma: float, steps: Int[Tensor, "B T"] | None) -> Tensor | float:
    """Compute gamma^(n - t), the worth at token t of what would be paid at the end; 1 outside the response."""
    if gamma == 1.0:
        return 1.0
    steps = torch.where(mask, ranks(mask) if steps is None else steps, 0)
    ahead = torch.where(mask, torch.where(is_last(mask), steps, 0).sum(1, keepdim=True) - steps, 0)
    return torch.pow(gamma, ahead.float())


def _steps_to_next(mask: Bool[Tensor, "B T"], steps: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count the steps of discounting from each valid token to the next valid one, over holes; 0 from the last."""
    never = torch.iinfo(steps.dtype).max
    later = torch.where(mask, steps, never).flip(1).cummin(1).values.flip(1)
    following = torch.nn.functional.pad(later, (0, 1), value=never)[:, 1:]
    return torch.where(mask & ~is_last(mask), following - steps, 0)


def check_beta(beta: float) -> None:
    """Refuse a number that is not a weight.

    Raises:
        ValueError: If it lies outside [0, 1].
    """
    check_unit_interval("beta", beta, "the part of the score that is spread")


@dataclass(frozen=True)
class Terminal(Redistribution):
    """Leave the whole score on the last token, as RLHF does. Causal: nothing is paid before the end."""

    @property
    def causal(self) -> bool:
        """True."""
        return True

    @property
    def weight(self) -> float:
        """Nothing is spread."""
        return 0.0

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Give everything to the last valid token."""
        return at_end(scores.scores, rollout.response_mask)


@dataclass(frozen=True)
class Uniform(Redistribution):
    """Spread beta of the score evenly, `share_t = R / n`. Retrospective, for n and R are known only at the end.

    Attributes:
        beta: The part of the score that is spread, in [0, 1].

    Raises:
        ValueError: If beta lies outside [0, 1].

    Source:
        The baseline of ABC (https://arxiv.org/abs/2402.00782); its official code ignores beta.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a beta that is not a weight."""
        check_beta(self.beta)

    @property
    def weight(self) -> float:
        """Beta."""
        return self.beta

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Give every valid token the same."""
        mask = rollout.response_mask
        return zero_outside(scores.scores.float()[:, None] / mask.sum(1, keepdim=True).clamp(min=1), mask)


@dataclass(frozen=True)
class PrefixDifference(Redistribution):
    r"""Pay each token what it added to the reward model's opinion of the prefix: RED. Causal.

    With p_t the reward head read after token t, p_0 after the bare prompt, and p_n the score itself:

        token_level_scores_t = beta * (gamma * p_t - p_{t-1}) + (1 - beta) * R * [t = n],   with p_n = R not discounted

    so a row sums to R - beta * p_0 (with gamma < 1: its discounted sum is gamma^(n-1) * R - beta * p_0), and p_0 is a
    constant of the prompt. The factor gamma stands only where a token and the next valid one are different steps of
    discounting.

    With gamma < 1 and actions whose ends depend on what follows (`Perplexity`, a parse), the factor at an end knows of
    the next token, and no more.

    Each difference is rounded to float32, and what a row thereby lacks of its sum, 2e-5 with opinions of standard
    deviation 3 over 512 tokens, is added to its last token (gamma = 1).

    Attributes:
        beta: The part of the score that is spread, in [0, 1].
        from_prompt: Whether p_0 is the score of the bare prompt, or 0, so that the row sums to R.

    Raises:
        ValueError: If beta lies outside [0, 1].

    Source:
        RED (https://arxiv.org/abs/2411.08302); Ng, Harada and Russell, 1999, for the shaping.
    """

    beta: float = 1.0
    from_prompt: bool = True

    def __post_init__(self) -> None:
        """Refuse a beta that is not a weight."""
        check_beta(self.beta)

    @property
    def needs(self) -> Needs:
        """The reward head at every prefix."""
        return Needs(prefix_scores=True)

    @property
    def causal(self) -> bool:
        """True."""
        return True

    @property
    def weight(self) -> float:
        """Beta."""
        return self.beta

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Give each token the difference that it made, without discount."""
        before, after = self._around(rollout, scores)
        differences = zero_outside(after - before, rollout.response_mask)
        return self._made_up(differences, rollout, scores, beta=1.0)

    def __call__(
        self, rollout: Rollout, scores: Scores, *, gamma: float = 1.0, steps: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T"]:
        """Spread the scores over the tokens as potential-based shaping; see `Redistribution.__call__`."""
        self._check(rollout, scores)
        mask = rollout.response_mask
        before, after = self._around(rollout, scores)
        if gamma != 1.0:
            after = after * torch.pow(gamma, _steps_to_next(mask, ranks(mask) if steps is None else steps).float())
        spread = zero_outside(after - before, mask)
        placed = self.beta * spread + (1 - self.beta) * at_end(scores.scores, mask)
        if gamma != 1.0:
            return placed
        return self._made_up(placed, rollout, scores, beta=self.beta)

    def _made_up(
        self, placed: Float[Tensor, "B T"], rollout: Rollout, scores: Scores, *, beta: float
    ) -> Float[Tensor, "B T"]:
        """Add to the last token what a row lacks by rounding of R - beta * p_0."""
        assert scores.prefix_scores is not None  # __call__ has checked; for the type checker
        total = scores.scores.double() - beta * self.from_prompt * scores.prefix_scores[:, 0].double()
        return placed + at_end(total - placed.sum(1, dtype=torch.float64), rollout.response_mask)

    def _around(self, rollout: Rollout, scores: Scores) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Read the opinion before and after each token; tokens that the policy did not choose are passed over."""
        assert scores.prefix_scores is not None  # __call__ has checked; for the type checker
        mask = rollout.response_mask
        after = torch.where(is_last(mask), scores.scores.float()[:, None], scores.prefix_scores[:, 1:].float())
        prompt = scores.prefix_scores[:, :1].float() if self.from_prompt else torch.zeros_like(after[:, :1])
        columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        latest = torch.where(mask, columns, 0).cummax(1).values
        previous = torch.nn.functional.pad(latest, (1, 0))[:, :-1]
        return torch.cat([prompt, after], 1).gather(1, previous), after
