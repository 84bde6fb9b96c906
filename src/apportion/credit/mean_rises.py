"""Runs of numbers that each end before the one that exceeds their mean."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.credit.guessed_rises import guessed_rises
from apportion.credit.merged_rises import merged_rises


def mean_rises(surprise: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Mark where actions begin when each ends before the token that exceeds its mean; without meaning in the filling.

        token t begins an action when    s_t * number > sum,    of the tokens of the action before

    Two ways lead there, neither token after token. On a CPU `guessed_rises` guesses which action is open here and there
    and mends what was wrong. On other devices, where to look what was wrong would be to wait, and in rows whose actions
    are too long to be guessed, `merged_rises` merges blocks.

    Args:
        surprise: (B, T) float32. What is compared, valid entries first in each row; finite.

    Returns:
        (B, T) bool. The first token of a row begins an action, too.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2, the wording of perplexity-based termination.
    """
    if surprise.device.type == "cpu":
        surprise = surprise.detach()
        with np.errstate(invalid="ignore"):  # where there is a NaN all behind it has no meaning
            begins, lost = map(torch.from_numpy, guessed_rises(surprise.numpy()))
        if lost.any():
            begins[lost] = merged_rises(surprise[lost])
        return begins
    return merged_rises(surprise)
