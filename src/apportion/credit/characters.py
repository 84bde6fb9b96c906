r"""Where characters of a kind end macro actions: `\s`, `\w+` or `[.!?]+\s` in all texts at once, by a table.

A regular expression that is one character, or a run of such, or one behind another, needs no engine: of what kind a
character is stands in a table. Where nearly every token ends a match, the engine of `re` would take several
milliseconds to list them.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from apportion.batch import ResponseTexts

# Any character, itself, an escaped one, a class, or brackets that hold neither their like nor begin with their end.
_SET = r"(\.|[^\\.^$*+?{}\[\]|()]|\\[sSdDwWnrtfv]|\\[^0-9A-Za-z]|\[\^?(?:[^\[\]\\^]|\\.)(?:[^\[\]\\]|\\.)*\])"
_PATTERN = re.compile(rf"(?:{_SET}\+?)?{_SET}(?:(\+)|\(\?={_SET}\))?", re.DOTALL)
_MEMBER, _NEXT, _UNKNOWN = 1, 2, 4
# What has been found out of each character there is, for each kind.
_TABLES: defaultdict["Characters", bytearray] = defaultdict(lambda: bytearray([_UNKNOWN]) * (sys.maxunicode + 1))


@dataclass(frozen=True)
class Characters:
    """A kind of characters, each of which ends a match, or each run of them, or each before one of another kind.

    Attributes:
        kind: A regular expression that matches one character, whatever stands around it.
        runs: Whether a match reaches as far as it can.
        following: The kind that has to follow, which a match leaves out; None where any may, or the end.
        leading: The kind that a match begins with, one or more, before those of `kind`; None where there is none.
    """

    kind: str
    runs: bool
    following: str | None
    leading: str | None

    @classmethod
    def of(cls, pattern: str) -> "Characters | None":
        """Recognise a regular expression that is no more than this; None for any other."""
        found = _PATTERN.fullmatch(pattern)
        return None if found is None or (found[1] and found[4]) else cls(found[2], bool(found[3]), found[4], found[1])

    def end_in(self, text: ResponseTexts) -> Bool[Tensor, "B T"] | None:
        """Mark the tokens that hold the last character of a match: of those that share it, the last.

        Args:
            text: B responses of T tokens.

        Returns:
            (B, T) bool. None where a character of the texts is both of `kind` and of `leading`: then what begins a
            match depends on where the one before it ended, and that is for `re`.
        """
        begins = text.begins
        lengths = np.array([*map(len, text.texts)], dtype=np.int64)
        stops = lengths.cumsum()
        kinds = self._kinds("".join(text.texts) + "\0")
        if self.leading is not None and kinds.max() == _MEMBER | _NEXT:
            return None
        ends = (kinds & _MEMBER).view(bool)
        if self.runs or self.following is not None:
            followed = np.roll((kinds & (_MEMBER if self.runs else _NEXT)) > 0, -1)
            followed[stops - 1] = followed[-1] = False  # what follows the last character of a text is another one's
            ends = ends > followed if self.runs else ends & followed
        if self.leading is not None:
            ends = self._led(ends, kinds, stops)
        before = np.zeros(len(ends) + 1, dtype=np.int32)
        np.cumsum(ends, out=before[1:])
        on_host = (torch.from_numpy(x) for x in (before, lengths, stops))
        before, lengths, stops = (x.to(begins.device, non_blocking=True) for x in on_host)
        starts = (stops - lengths)[:, None]
        places = torch.cat([starts + torch.minimum(begins, lengths[:, None]), stops[:, None]], 1)
        counts = before.index_select(0, places.view(-1)).view(places.shape)
        return counts[:, 1:] > counts[:, :-1]

    def _led(
        self, ends: Bool[np.ndarray, " N"], kinds: UInt8[np.ndarray, " N"], stops: Int[np.ndarray, " B"]
    ) -> Bool[np.ndarray, " N"]:
        """Keep the ends of those members, or runs of them, that begin behind a leading character of the same text."""
        leads, members = (np.roll((kinds & kind) > 0, 1) for kind in (_NEXT, _MEMBER))
        for before in (leads, members):
            before[0] = before[stops] = False
        if not self.runs:
            return ends & leads
        begins = (kinds & _MEMBER).view(bool) > members
        kept = np.zeros_like(ends)
        kept[np.flatnonzero(ends)[leads[np.flatnonzero(begins)]]] = True
        return kept

    def _kinds(self, text: str) -> UInt8[np.ndarray, " N"]:
        """Tell of each character what it is: a member, or one that may follow or lead, or both."""
        table = _TABLES[self]
        found = _look_up(table, text)
        if found.max() == _UNKNOWN:
            for character in set(text):
                table[ord(character)] = self._kind(character)
            found = _look_up(table, text)
        return found

    def _kind(self, character: str) -> int:
        member = re.fullmatch(self.kind, character) is not None
        other = self.following or self.leading
        return _MEMBER * member + _NEXT * (other is not None and re.fullmatch(other, character) is not None)


def _look_up(table: bytearray, text: str) -> UInt8[np.ndarray, " N"]:
    """Read what stands in a table for each character of a text: in half of the time where all are of the first 256."""
    try:
        return np.frombuffer(text.encode("latin-1").translate(bytes(table[:256])), dtype=np.uint8)
    except UnicodeEncodeError:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)
        return np.frombuffer(table, dtype=np.uint8).take(codes)
