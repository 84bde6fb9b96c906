"""Redistributions that follow attention: of the reward model as it reads its score, or of the policy to itself."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.batch import AttentionRequest, Needs, Rollout, Scores, heads_of
from apportion.credit.redistribution import Redistribution, check_beta
from apportion.masked import Packing, is_last, zero_outside


@dataclass(frozen=True)
class Attention(Redistribution):
    """Spread beta of the score by the attention that the reward model pays when it reads its score: ABC.

    Retrospective: both the attention at the end and the score depend on the whole response. With a_t the attention that
    the chosen layer of the reward model pays to token t at the chosen row, averaged over heads, and cut to the
    response:

        share_t = R * a_t / sum_i a_i

    A row without attention on its response, or with NaN or an infinity among it, keeps its score on the last token;
    `attention_fallbacks` counts such rows.

    Attributes:
        beta: The part of the score that is spread, in [0, 1].
        layer: Layer number, negative from the end; None for the last full-attention layer.
        heads: Heads that are averaged, from 0; None for all.
        row: Whose attention it is: "read", the position where the reward head reads, as ABC's paper has it; "last", the
            response's last token up to there, which ABC's code counts to (another one where a template follows);
            "mean", as `PolicyAttention` reads the policy: for each token the mean over the response tokens that see it.

    Raises:
        ValueError: If beta lies outside [0, 1], the heads are none, or the row is unknown.

    Source:
        ABC (https://arxiv.org/abs/2402.00782), section 3: last layer, mean over heads, the row of the read-out; beta =
        0.8 in its published runs.
    """

    beta: float = 0.8
    layer: int | None = None
    heads: tuple[int, ...] | None = None
    row: Literal["read", "last", "mean"] = "read"

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        check_beta(self.beta)
        object.__setattr__(self, "heads", heads_of(self.heads))
        _ = self.needs

    @property
    def needs(self) -> Needs:
        """The reward model's attention."""
        return Needs(attention=AttentionRequest(layer=self.layer, heads=self.heads, row=self.row))

    @property
    def weight(self) -> float:
        """Beta."""
        return self.beta

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Give each token its part of the attention."""
        assert scores.attention is not None  # __call__ has checked; for the type checker
        return _by_weights(scores.attention, scores.scores, rollout.response_mask)


@dataclass(frozen=True)
class PolicyAttention(Redistribution):
    """Spread beta of the score by the attention that the policy pays to its own response: ABC-D and ABC-D2.

    Retrospective: what later tokens attend to, and the score, are known at the end only. With A[q, j] the attention of
    the policy's token q to token j in the chosen layer, averaged over heads, for the tokens 0..n-1 of a response:

        mean (ABC-D)    w_j = sum_{q=j}^{n-1} A[q, j] / (n - j)
        last (ABC-D2)   w_j = A[n-1, j]
        share_t         = R * w_t / sum_i w_i

    Rows are not renormalised; what the policy pays to the prompt is dropped. In a sliding layer the mean is over the
    rows whose window holds j (GPT-Neo's local layers show none). The trainer reads A while it samples, in the pass that
    gives the log-probabilities. A row without attention keeps its score on the last token, as in `Attention`.

    Attributes:
        beta: The part of the score that is spread, in [0, 1].
        mode: "mean" for ABC-D, "last" for ABC-D2.
        legacy_shift: Reproduce the official code: its rows end before the last token (q up to n-2), and it stores the
            weight of token j at j + 1, so that the first token gets nothing.
        layer: Layer number, negative from the end; None for the last full-attention layer.
        heads: Heads that are averaged, from 0; None for all.

    Raises:
        ValueError: If beta lies outside [0, 1], the mode is unknown, or the heads are none.

    Source:
        ABC (https://arxiv.org/abs/2402.00782), ABC-D; in the teacher-forced form, where the last token is a row too.
    """

    beta: float = 0.8
    mode: Literal["mean", "last"] = "mean"
    legacy_shift: bool = False
    layer: int | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        check_beta(self.beta)
        object.__setattr__(self, "heads", heads_of(self.heads))
        if self.mode not in ("mean", "last"):
            raise ValueError(f"mode is {self.mode!r}; choose 'mean' (ABC-D) or 'last' (ABC-D2)")
        if not isinstance(self.legacy_shift, bool):
            raise ValueError(f"legacy_shift is {self.legacy_shift!r}; choose True or False")
        _ = self.needs

    @property
    def needs(self) -> Needs:
        """The policy's attention."""
        return Needs(
            policy_attention=AttentionRequest(
                layer=self.layer, heads=self.heads, row=self.mode, before_last=self.legacy_shift
            )
        )

    @property
    def weight(self) -> float:
        """Beta."""
        return self.beta

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Give each token its part of the attention."""
        assert scores.policy_attention is not None  # __call__ has checked; for the type checker
        weights, mask = scores.policy_attention, rollout.response_mask
        return _by_weights(_shifted(weights, mask) if self.legacy_shift else weights, scores.scores, mask)


def _shifted(weights: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Move each weight to the next valid token; the first gets 0, and the last one's is lost."""
    packing = Packing(mask)
    return packing.unpack(torch.nn.functional.pad(packing.pack(weights), (1, 0))[:, :-1])


def _by_weights(
    weights: Float[Tensor, "B T"], scores: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Share each score out by weights, or leave it at the end where they have no mass."""
    weights, mass = _weights_and_mass(weights, mask)
    alpha = torch.where(mass > 0, weights / torch.where(mass > 0, mass, 1), is_last(mask).float())
    return zero_outside(scores.float()[:, None] * alpha, mask)


def _weights_and_mass(
    weights: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B 1"]]:
    """Scale each row by its largest weight, so that no sum overflows, and sum it; 0 where that is not finite."""
    weights = zero_outside(weights, mask)
    largest = torch.nn.functional.pad(weights, (0, 1)).amax(1, keepdim=True)
    weights = weights / torch.where(largest > 0, largest, 1)
    mass = weights.sum(1, keepdim=True)
    return weights, torch.where(mass.isfinite(), mass, 0)


def attention_fallbacks(rollout: Rollout, scores: Scores) -> Int[Tensor, ""]:
    """Count the responses with no attention, or one that is not finite: their score stays at the end.

    Args:
        rollout: The responses.
        scores: Their scores; without attention, of the reward model or of the policy, there is nothing to fall back
            from.

    Returns:
        () int64. Empty responses are not counted, and none twice.
    """
    mask = rollout.response_mask
    lacking = torch.zeros_like(mask.any(1))
    for weights in (scores.attention, scores.policy_attention):
        if weights is not None:
            lacking = lacking | (_weights_and_mass(weights, mask)[1][:, 0] <= 0)
    return (mask.any(1) & lacking).sum()
