"""Where a regular expression closes macro actions: sentences, lines, reasoning steps."""

import re
from array import array
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.batch import ResponseTexts, Rollout
from apportion.credit.characters import Characters
from apportion.credit.termination import TerminationCondition


@dataclass(frozen=True)
class Delimiter(TerminationCondition):
    r"""Close where a regular expression matches, at the token that holds the match's last character.

    Matches are those of `re.finditer` in the text of the response alone; empty matches close nothing. A token that
    holds the ends of two matches closes once; where tokens share a character, the last of them closes.

    Attributes:
        pattern: A regular expression of Python: `\n` for lines, `\n\n` for reasoning steps, `[.!?](?=\s)` for
            sentences.

    Raises:
        ValueError: If the pattern is no regular expression.

    Source:
        Steps as segments: VinePPO (https://arxiv.org/abs/2410.01679); sentences: MA-RLHF
        (https://arxiv.org/abs/2410.02743) splits so before it parses.
    """

    pattern: str

    def __post_init__(self) -> None:
        """Refuse what cannot be compiled, or closes nothing."""
        if not isinstance(self.pattern, str):
            raise ValueError(f"pattern is {self.pattern!r}; give a regular expression as text, such as '\\n'")
        if not self.pattern:
            raise ValueError(
                "pattern is empty, which matches nothing that could close an action; give one, such as '\\n'"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern is {self.pattern!r}, which is no regular expression ({error}); mend it, or escape what is "
                "meant literally with a backslash"
            ) from error

    @property
    def needs(self) -> frozenset[str]:
        """The texts of the responses."""
        return frozenset({"text"})

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the tokens that end a match, and the last valid token."""
        self.check(rollout)
        assert rollout.text is not None  # checked above; for the type checker
        text, mask = rollout.text, rollout.response_mask
        characters = self._characters
        ends = None if characters is None or characters.are_rare(text.texts) else characters.end_in(text)
        ends = _hold(text, self._ends(text.texts)) if ends is None else ends
        return mask & ends | rollout.packing.last

    @cached_property
    def _characters(self) -> Characters | None:
        """The pattern, where it asks of nothing but what kinds of characters follow one another."""
        return Characters.of(self.pattern)

    def _ends(self, texts: tuple[str, ...]) -> Int[Tensor, "B M"]:
        """List where matches end, one after the last character of each; behind the last of a row stands 0."""
        finditer = re.compile(self.pattern).finditer
        ends = [[match.end() for match in finditer(text) if match[0]] for text in texts]
        width = max(map(len, ends), default=0)
        numbers = array("q")  # several times faster than `torch.tensor`
        for row in ends:
            numbers.fromlist(row + [0] * (width - len(row)))
        numbers.append(0)  # for `frombuffer` refuses none
        return torch.frombuffer(numbers, dtype=torch.long)[:-1].view(len(texts), width)


def _hold(text: ResponseTexts, ends: Int[Tensor, "B M"]) -> Bool[Tensor, "B T"]:
    """Mark, for the character before each of some places, the last token that holds it.

    A token's part of a text reaches from its first character to that of the next token with text.
    """
    begins = text.begins
    begun = torch.searchsorted(begins, ends.to(begins.device, non_blocking=True))
    found = torch.zeros(len(begins), begins.shape[1] + 1, dtype=torch.bool, device=begins.device)
    return found.scatter_(1, begun, True)[:, 1:]  # column 0: no token had begun
