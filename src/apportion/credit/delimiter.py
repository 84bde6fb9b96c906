"""Where a regular expression closes macro actions: sentences, lines, reasoning steps."""

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.batch import ResponseTexts, Rollout
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
        mask = rollout.response_mask
        return mask & _holds(rollout.text, self._last_characters(rollout.text.texts)) | rollout.packing.last

    def _last_characters(self, texts: tuple[str, ...]) -> Int[Tensor, "2 L"]:
        """List row and place of each match's last character."""
        finditer = re.compile(self.pattern).finditer
        ends = [[*map(re.Match.end, filter(itemgetter(0), finditer(text)))] for text in texts]  # no loop of Python's
        places, counts = _numbers(chain.from_iterable(ends)) - 1, _numbers(map(len, ends))
        rows = torch.arange(len(texts)).repeat_interleave(counts, output_size=len(places))
        return torch.stack([rows, places])


def _numbers(numbers: Iterable[int]) -> Int[Tensor, " L"]:
    """Put numbers into a tensor, several times faster than `torch.tensor` does it."""
    return torch.frombuffer(array("q", [*numbers, 0]), dtype=torch.long)[:-1]  # an empty buffer is refused


def _holds(text: ResponseTexts, characters: Int[Tensor, "2 L"]) -> Bool[Tensor, "B T"]:
    """Mark, for each of some characters, the last token that holds it.

    A token's part of a text reaches from its first character to that of the next token with text. A token without text
    gets the beginning of the next one, and so an empty part.
    """
    start, end = text.spans.unbind(2)
    length = max(map(len, text.texts), default=0)
    begin = torch.nn.functional.pad(torch.where(start < end, start, length), (0, 1), value=length)
    begin = begin.flip(1).cummin(1).values.flip(1)
    # One line of numbers, row after row; what begins at `length` is after all characters of its row.
    shift = (length + 1) * torch.arange(len(begin), device=begin.device)
    row, place = characters.to(begin.device, non_blocking=True)
    holders = torch.searchsorted((begin + shift[:, None]).flatten(), shift[row] + place, right=True) - 1
    found = torch.zeros_like(begin, dtype=torch.bool)
    found.view(-1)[holders] = True  # a character before the first token goes to the last column of the row before
    return found[:, :-1]
