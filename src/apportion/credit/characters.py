r"""Where sequences of characters end macro actions: `\s`, `[.!?]+\s` or `\n\n|Step \d+:` in all texts at once.

A regular expression that asks one character after another of what kind it is needs no engine: kinds stand in a table,
and all matches that begin anywhere are followed together, kind by kind. The engine of `re` would take milliseconds, but
where it has a plain text to look for: that is left to it.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from apportion.batch import ResponseTexts

# One character, itself or escaped; and a kind: any, one, a class, or brackets without their like or their end in front.
_ONE = r"(?:[^\\.^$*+?{}\[\]|()]|\\[nrtfv]|\\[^0-9A-Za-z])"
_SET = rf"(?:\.|{_ONE}|\\[sSdDwW]|\[\^?(?:[^\[\]\\^]|\\.)(?:[^\[\]\\]|\\.)*\])"
_STEP = re.compile(rf"({_SET})([+*?]?)", re.DOTALL)
_LITERAL = re.compile(rf"{_ONE}{{2,}}", re.DOTALL)
_STEPS = rf"{_SET}\+?(?:{_SET}[+*?]?)*"
_ALTERNATIVE = re.compile(rf"(?:\(\?<=({_SET})\))?({_STEPS})(?:\(\?=({_SET})\))?(\||\Z)", re.DOTALL)

MOST_STEPS = 16
"""Steps of a regular expression, in all its alternatives, each of which passes over all that may begin a match."""
RARE = 64
"""Characters a match from which on `re`, which looks for a plain beginning quickly, is quicker."""
_ESCAPED = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\f": "\f", r"\v": "\v"}

Marks = UInt8[np.ndarray, " N"]
"""Of each character of all texts, a bit for each kind that it is of."""
Places = Int[np.ndarray, " M"]
"""Characters of all texts, by their number."""


@dataclass(frozen=True)
class Step:
    """What the next characters of a match are to be.

    Attributes:
        kind: One bit.
        runs: Whether as many are taken as there are, or one.
        optional: Whether there may be none.
    """

    kind: int
    runs: bool
    optional: bool

    def behind(self, places: Places, marks: Marks) -> Places:
        """Step over the character of the kind at each place, or over all of its run."""
        if not self.runs or not len(places):
            return places + 1
        members = _are(marks, self.kind)
        stops = np.flatnonzero(members[:-1] > members[1:]) + 1
        return stops[np.searchsorted(stops, places)]

    def take(self, marks: Marks, starts: Places, stops: Places) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " K"]]:
        """Lengthen matches by this step, in place where it is optional; keep those for which that can be done."""
        here = np.flatnonzero(_are(marks[stops], self.kind))
        if self.optional:
            stops[here] = self.behind(stops[here], marks)
            return starts, stops
        return starts[here], self.behind(stops[here], marks)


@dataclass(frozen=True)
class Alternative:
    """What one alternative of a regular expression asks of the characters of a match, in turn; kinds are single bits.

    Attributes:
        before: The kind of the character before the match; 0 where any may stand there, or none.
        steps: The characters of the match; the first step is not optional.
        ahead: The kind of the character after the match; 0 where any may stand there, or none.
    """

    before: int
    steps: tuple[Step, ...]
    ahead: int

    def is_unambiguous(self, marks: Marks) -> bool:
        """Tell whether no character is of two kinds of which one ends where the other begins.

        With one that is, a step might have to give back what it took, or might begin at a run's second character.
        """
        pairs = [self.before | self.steps[0].kind] if self.before and self.steps[0].runs else []
        for place, step in enumerate(self.steps, 1):
            if step.runs or step.optional:
                pairs += [step.kind | after for after in self._after(place)]
        return not any((marks & pair == pair).any() for pair in pairs)

    def _after(self, place: int) -> list[int]:
        """List the kinds that may come next behind so many steps."""
        after = []
        for step in self.steps[place:]:
            after.append(step.kind)
            if not step.optional:
                return after
        return [*after, self.ahead] if self.ahead else after

    def follow(self, marks: Marks) -> tuple[Places, Places]:
        """Find where matches begin, and where they end, behind their last character; runs from their first on."""
        first, *steps = self.steps
        members = _are(marks, first.kind)
        if first.runs and not self.before:
            edges = np.flatnonzero(members[1:] != members[:-1]) + 1
            starts, stops = edges[::2], edges[1::2]
        else:
            starts = np.flatnonzero(members[1:] & _are(marks[:-1], self.before) if self.before else members[1:]) + 1
            stops = first.behind(starts, marks)
        for step in steps:
            starts, stops = step.take(marks, starts, stops)
        if not self.ahead:
            return starts, stops
        kept = np.flatnonzero(_are(marks[stops], self.ahead))
        return starts[kept], stops[kept]


@dataclass(frozen=True)
class Characters:
    """A regular expression that is made of kinds of characters, runs of them, and alternatives of such.

    Attributes:
        kinds: Regular expressions of at most eight, each of which matches one character, whatever stands around it.
        alternatives: The alternatives, the first of which is preferred.
        opening: The text that every match begins with, as far as it is known.
    """

    kinds: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    opening: str

    @classmethod
    def of(cls, pattern: str) -> "Characters | None":
        """Recognise a regular expression that is no more than this; None for any other."""
        bits: dict[str, int] = {}
        if _LITERAL.fullmatch(pattern):
            return None

        def bit(kind: str | None) -> int:
            return 0 if kind is None else bits.setdefault(kind, 1 << len(bits))

        alternatives, place = [], 0
        while found := _ALTERNATIVE.match(pattern, place):
            before, written, ahead, bar = found.groups()
            parts = _STEP.findall(written)
            steps = (Step(bit(kind), often in ("+", "*"), often in ("*", "?")) for kind, often in parts)
            alternatives.append(Alternative(bit(before), tuple(steps), bit(ahead)))
            place = found.end()
            if not bar:
                length = sum(len(alternative.steps) for alternative in alternatives)
                opening = _opening(parts) if len(alternatives) == 1 else ""
                known = cls(tuple(bits), tuple(alternatives), opening)
                return known if len(bits) <= 8 and length <= MOST_STEPS else None
        return None

    def are_rare(self, texts: Sequence[str]) -> bool:
        """Tell whether matches have a plain beginning of which there are so few that `re` finds them sooner."""
        return bool(self.opening) and RARE * sum(text.count(self.opening) for text in texts) < sum(map(len, texts))

    def end_in(self, text: ResponseTexts) -> Bool[Tensor, "B T"] | None:
        """Mark the tokens that hold the last character of a match: of those that share it, the last.

        Args:
            text: B responses of T tokens.

        Returns:
            (B, T) bool. None where which characters a match takes depends on more than their kinds; that is for `re`.
        """
        begins = text.begins
        lengths = np.array([*map(len, text.texts)], dtype=np.int64)
        bounds = (lengths + 1).cumsum()
        marks = _table(self.kinds).look_up("\0".join(("", *text.texts, "")))
        marks[0] = marks[bounds] = 0  # what stands between two texts is of no kind
        stops = self._stops(marks)
        if stops is None:
            return None
        before = np.zeros(len(marks), dtype=np.int32)
        before[stops] = 1
        np.cumsum(before, out=before)
        on_host = (torch.from_numpy(x) for x in (before, lengths, bounds))
        before, lengths, bounds = (x.to(begins.device, non_blocking=True) for x in on_host)
        starts = (bounds - lengths)[:, None]
        places = torch.cat([starts + torch.minimum(begins, lengths[:, None]), bounds[:, None]], 1)
        counts = before.index_select(0, places.view(-1)).view(places.shape)
        return counts[:, 1:] > counts[:, :-1]

    def _stops(self, marks: Marks) -> Places | None:
        """List where matches end, of those that overlap the first from the left; None where that is for `re`."""
        if not all(alternative.is_unambiguous(marks) for alternative in self.alternatives):
            return None
        found = [alternative.follow(marks) for alternative in self.alternatives]
        starts, stops = (np.concatenate(places) for places in zip(*found, strict=True))
        order = starts.argsort(kind="stable") if len(found) > 1 else slice(None)
        starts, stops = starts[order], stops[order]
        if (starts[1:] >= stops[:-1]).all():
            return stops
        before = np.maximum.accumulate(np.concatenate([[0], stops]))[:-1]
        free = starts >= before
        if (free | (stops <= before)).all():  # those that begin inside of others end there, too
            return stops[free]
        sizes = [len(places) for places, _ in found]
        in_runs = np.repeat([alternative.steps[0].runs for alternative in self.alternatives], sizes)[order]
        return _first_from_left(starts, stops, in_runs)


def _opening(parts: Sequence[tuple[str, str]]) -> str:
    """Read the plain characters at the beginning of an alternative: of what is repeated the first."""
    opening = ""
    for kind, often in parts:
        if often in ("*", "?") or not re.fullmatch(_ONE, kind):
            break
        opening += _ESCAPED.get(kind, kind[-1])
        if often:
            break
    return opening


def _first_from_left(starts: Places, stops: Places, in_runs: Bool[np.ndarray, " M"]) -> Int[np.ndarray, " K"] | None:
    """Keep of matches that overlap those that a search from the left finds.

    Returns:
        Where they stop. None where one that begins with a run is cut short: it might begin again behind the cut.
    """
    kept, reached = [], 0
    for start, stop, in_run in zip(starts.data, stops.data, in_runs.data, strict=True):
        if start >= reached:
            kept.append(reached := stop)
        elif in_run and stop > reached:
            return None
    return np.array(kept, dtype=np.int64)


def _are(marks: Marks, kind: int) -> Bool[np.ndarray, " N"]:
    """Tell which characters are of a kind."""
    return (marks & kind) != 0


class _Table:
    """Of which kinds each character is, as far as found out. Threads may share it, for no entry changes once known."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self._kinds = [re.compile(kind) for kind in kinds]
        self._latin = bytes(map(self._ask, bytes(range(256)).decode("latin-1")))
        # One more than the marks, 0 where they are not known; 2 MB, most of them never touched.
        self._any = np.zeros(sys.maxunicode + 1, dtype=np.int16)

    def look_up(self, text: str) -> Marks:
        """Tell of each character what it is: in half of the time where all are of the first 256."""
        try:
            return np.frombuffer(bytearray(text.encode("latin-1").translate(self._latin)), dtype=np.uint8)
        except UnicodeEncodeError:
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)
        found = self._any.take(codes)
        if not found.all():
            for character in set(text):
                self._any[ord(character)] = self._ask(character) + 1
            found = self._any.take(codes)
        return (found - 1).astype(np.uint8)

    def _ask(self, character: str) -> int:
        return sum(1 << i for i, kind in enumerate(self._kinds) if kind.fullmatch(character))


_table = lru_cache(maxsize=64)(_Table)
