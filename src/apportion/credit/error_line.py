"""Blame for a program that fails: the line that the compiler or the interpreter names."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.batch import Needs, Rollout, Scores
from apportion.credit.redistribution import Redistribution, at_end, check_beta


@dataclass(frozen=True)
class ErrorLine(Redistribution):
    r"""Put beta of the score on the line of the error, where a program does not compile or ends in one.

    With L_b the tokens of response b that hold a character of the reported line,

        share_t = R / |L_b| for t in L_b,      and share_t = R * [t = n] where there is no error, or L_b is empty

    so the macro actions that write the line are blamed by as many of its tokens as they hold. A line that cannot be
    named (a time-out, an error in what the task gave) leaves the score at the end, as `Terminal` does.

    Retrospective: which line is to blame, and whether any is, is known only when the program was complete and ran. A
    line that defines a wrong value may be paid nothing for the error of a later line that uses it.

    Attributes:
        beta: The part of the score that is put there, in [0, 1].

    Raises:
        ValueError: If beta lies outside [0, 1].

    Source:
        Ours; MA-RLHF (https://arxiv.org/abs/2410.02743) leaves the score of a program on its last token.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a beta that is not a weight."""
        check_beta(self.beta)

    @property
    def needs(self) -> Needs:
        """The tokens of the reported line."""
        return Needs(error_tokens=True)

    @property
    def weight(self) -> float:
        """Beta."""
        return self.beta

    def shares(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B T"]:
        """Divide the score evenly between the tokens of the line."""
        assert scores.error_tokens is not None  # __call__ has checked; for the type checker
        mask, score = rollout.response_mask, scores.scores.float()
        blamed = scores.error_tokens & mask
        count = blamed.sum(1, keepdim=True)
        spread = torch.where(blamed, score[:, None] / count.clamp(min=1), 0)
        return torch.where(count > 0, spread, at_end(score, mask))
