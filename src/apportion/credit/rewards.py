"""The reward of each token: its part of the score, less the price of leaving the reference."""

from jaxtyping import Bool, Float
from torch import Tensor

from apportion.masked import zero_outside


def token_level_rewards(
    token_level_scores: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
) -> Float[Tensor, "B T"]:
    """Subtract the KL penalty from the scores, token by token.

        r_t = s_t - kl_coef * (log pi_old(y_t) - log pi_ref(y_t))

    Args:
        token_level_scores: (B, T) float. Scores after redistribution.
        old_logprobs: (B, T) float. Log-probability under the sampling policy, in nats.
        ref_logprobs: (B, T) float. Log-probability under the reference, in nats.
        mask: (B, T) bool. True on valid response tokens.
        kl_coef: Price of a nat, at least 0; at 0 the log-probabilities are not read, whatever they are.

    Returns:
        (B, T) float32. 0 outside the mask.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 2; the estimator k1, constant kl_coef.
    """
    if kl_coef == 0:
        return zero_outside(token_level_scores, mask)
    penalty = kl_coef * (old_logprobs.float() - ref_logprobs.float())
    return zero_outside(token_level_scores.float() - penalty, mask)
