"""Parsers for tests of the processes that they run in, importable there."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion import Parser, ParseTree


def pairs(text: str) -> list[ParseTree]:
    """Group the words of a text in pairs: ((one two) (three four) five)."""
    words, place = [], 0
    for word in text.split():
        start = text.index(word, place)
        place = start + len(word)
        words.append((start, place))
    return [flat_pairs(words)]


def flat_pairs(words: Sequence[tuple[int, int]]) -> ParseTree:
    grouped: Any = tuple(tuple(words[first : first + 2]) for first in range(0, len(words), 2))
    return ParseTree.of(grouped, children=lambda node: node if isinstance(node[0], tuple) else (), span=tuple)


def moody(text: str) -> list[ParseTree]:
    """Fail, return nonsense, or die, where the text says so."""
    if "fail" in text:
        raise RuntimeError("a sentence that I do not like")
    if "nonsense" in text:
        return ["a tree"]  # pyright: ignore[reportReturnType]
    if "beyond" in text:
        return [ParseTree(((0, 99),), ((0, 1),))]
    if "die" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    print("chatter on the standard output")
    return pairs(text)


def hanging(text: str) -> list[ParseTree]:
    """Take forever where the text says so."""
    time.sleep(60 if "hang" in text else 0)
    return pairs(text)


@dataclass(frozen=True)
class Forgetful(Parser):
    """Answers one text too few whenever it is asked for several."""

    def load(self) -> None:
        """Nothing."""

    def __call__(self, text: str) -> Sequence[ParseTree]:
        return pairs(text)

    def many(self, texts: Sequence[str]) -> list[Sequence[ParseTree]]:
        return [self(text) for text in texts][: max(1, len(texts) - 1)]


def number_of_process(text: str) -> list[ParseTree]:
    """Tell in the first word's span which process has parsed, and append to a file that it was asked."""
    with Path(os.environ["ASKED"]).open("a") as file:
        file.write(f"{os.getpid()} {text}\n")
    return pairs(text)


@dataclass(frozen=True)
class Slow(Parser):
    """Take a while for each text."""

    seconds: float = 0.2

    def load(self) -> None:
        """Load nothing."""

    def __call__(self, text: str) -> list[ParseTree]:
        """Wait, and parse."""
        time.sleep(self.seconds)
        return pairs(text)


@dataclass(frozen=True)
class Dying(Parser):
    """Die while loading."""

    def load(self) -> None:
        """End the process."""
        os._exit(3)

    def __call__(self, text: str) -> list[ParseTree]:
        """Parse nothing."""
        raise AssertionError(text)
