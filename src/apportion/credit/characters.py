r"""Where characters of a kind end macro actions: `\s`, `\w+` or `[.!?](?=\s)` in all texts at once, by a table.

A regular expression that is one character, or a run of such, needs no engine: of what kind a character is stands in a
table. Where nearly every token ends a match, the engine of `re` would take several milliseconds to list them.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from apportion.batch import ResponseTexts

# Any character, itself, an escaped one, a class, or brackets that hold neither their like nor begin with their end.
_SET = r"(\.|[^\\.^$*+?{}\[\]|()]|\\[sSdDwWnrtfv]|\\[^0-9A-Za-z]|\[\^?(?:[^\[\]\\^]|\\.)(?:[^\[\]\\]|\\.)*\])"
_PATTERN = re.compile(rf"{_SET}(?:(\+)|\(\?={_SET}\))?", re.DOTALL)
_MEMBER, _NEXT, _UNKNOWN = 1, 2, 4
# What has been found out of each character there is, for each kind.
_TABLES: defaultdict["Characters", bytearray] = defaultdict(lambda: bytearray([_UNKNOWN]) * (sys.maxunicode + 1))


@dataclass(frozen=True)
class Characters:
    """A kind of characters, each of which is a match, or each run of them, or each before one of another kind.

    Attributes:
        kind: A regular expression that matches one character, whatever stands around it.
        runs: Whether a match reaches as far as it can.
        following: The kind that has to follow, which a match leaves out; None where any may, or the end.
    """

    kind: str
    runs: bool
    following: str | None

    @classmethod
    def of(cls, pattern: str) -> "Characters | None":
        """Recognise a regular expression that is no more than this; None for any other."""
        found = _PATTERN.fullmatch(pattern)
        return None if found is None else cls(found[1], bool(found[2]), found[3])

    def end_in(self, text: ResponseTexts) -> Bool[Tensor, "B T"]:
        """Mark the tokens that hold the last character of a match: of those that share it, the last.

        Args:
            text: B responses of T tokens.

        Returns:
            (B, T) bool.
        """
        begins = text.begins
        lengths = np.array([*map(len, text.texts)], dtype=np.int64)
        stops = lengths.cumsum()
        kinds = self._kinds("".join(text.texts) + "\0")
        ends = (kinds & _MEMBER).view(bool)
        if self.runs or self.following is not None:
            followed = np.roll((kinds & (_MEMBER if self.runs else _NEXT)) > 0, -1)
            followed[stops - 1] = False  # what follows the last character of a text is another one's
            ends = ends > followed if self.runs else ends & followed
        before = np.zeros(len(ends) + 1, dtype=np.int32)
        np.cumsum(ends, out=before[1:])
        on_host = (torch.from_numpy(x) for x in (before, lengths, stops))
        before, lengths, stops = (x.to(begins.device, non_blocking=True) for x in on_host)
        starts = (stops - lengths)[:, None]
        places = torch.cat([starts + torch.minimum(begins, lengths[:, None]), stops[:, None]], 1)
        counts = before.index_select(0, places.view(-1)).view(places.shape)
        return counts[:, 1:] > counts[:, :-1]

    def _kinds(self, text: str) -> UInt8[np.ndarray, " N"]:
        """Tell of each character what it is: a member, or one that may follow, or both."""
        table = _TABLES[self]
        found = _look_up(table, text)
        if found.max() == _UNKNOWN:
            for character in set(text):
                table[ord(character)] = self._kind(character)
            found = _look_up(table, text)
        return found

    def _kind(self, character: str) -> int:
        member = re.fullmatch(self.kind, character) is not None
        follows = self.following is not None and re.fullmatch(self.following, character) is not None
        return _MEMBER * member + _NEXT * follows


def _look_up(table: bytearray, text: str) -> UInt8[np.ndarray, " N"]:
    """Read what stands in a table for each character of a text: in half of the time where all are of the first 256."""
    try:
        return np.frombuffer(text.encode("latin-1").translate(bytes(table[:256])), dtype=np.uint8)
    except UnicodeEncodeError:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)
        return np.frombuffer(table, dtype=np.uint8).take(codes)
