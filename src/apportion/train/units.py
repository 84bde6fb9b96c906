"""From the reward's units to those that are trained on."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.batch import Scores
from apportion.masked import masked_var


def unit_scale(scores: Float[Tensor, " B"]) -> float:
    """Find the factor that gives scores a standard deviation of 1.

    Args:
        scores: (B) float. Those of the whole batch, over all processes.

    Returns:
        The factor; 1 where scores do not vary.
    """
    deviation = float(masked_var(scores, torch.ones_like(scores, dtype=torch.bool)).sqrt())
    return 1 / deviation if deviation > 0 else 1.0


def trained_scores(scores: Scores, ended: Bool[Tensor, " B"], scale: float, penalty: float | None) -> Scores:
    """Scale scores, and take off the price of not having ended.

    Args:
        scores: What the reward said, in its own units.
        ended: (B) bool. Whether each response has ended by itself.
        scale: Factor on everything that is measured in units of the score.
        penalty: Subtracted, after scaling, from the score of a response that did not end; None for nothing.

    Returns:
        The scores that credit is assigned from.
    """
    scores = scores.map(lambda x: x * scale)
    return scores if penalty is None else replace(scores, scores=scores.scores - penalty * (~ended).float())
