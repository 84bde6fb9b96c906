"""Steps that a function takes: what they are called, how they are written, what they do, and how they go wrong."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step of a function.

    Attributes:
        words: What the description calls it.
        line: Its Python, on the variable `x`.
        apply: What it does.
    """

    words: str
    line: str
    apply: Callable[[Any], Any]


CONSTANTS = range(2, 10)


def _with_constants() -> list[Step]:
    """Steps on numbers that have a number of their own."""
    steps = []
    for k in CONSTANTS:
        steps += [
            Step(f"plus {k}", f"x = x + {k}", lambda x, k=k: x + k),
            Step(f"minus {k}", f"x = x - {k}", lambda x, k=k: x - k),
            Step(f"times {k}", f"x = x * {k}", lambda x, k=k: x * k),
            Step(f"divided by {k} rounded down", f"x = x // {k}", lambda x, k=k: x // k),
            Step(f"modulo {k}", f"x = x % {k}", lambda x, k=k: x % k),
            Step(f"at most {k}", f"x = min(x, {k})", lambda x, k=k: min(x, k)),
            Step(f"at least {k}", f"x = max(x, {k})", lambda x, k=k: max(x, k)),
        ]
    return steps


ON_NUMBERS = (
    *_with_constants(),
    Step("squared", "x = x * x", lambda x: x * x),
    Step("negated", "x = -x", lambda x: -x),
    Step("without sign", "x = abs(x)", abs),
)
ON_LISTS = (
    Step("sorted", "x = sorted(x)", sorted),
    Step("reversed", "x = x[::-1]", lambda x: x[::-1]),
    Step("without the first", "x = x[1:]", lambda x: x[1:]),
    Step("without the last", "x = x[:-1]", lambda x: x[:-1]),
    Step("only even ones", "x = [n for n in x if n % 2 == 0]", lambda x: [n for n in x if n % 2 == 0]),
    Step("each doubled", "x = [n * 2 for n in x]", lambda x: [n * 2 for n in x]),
    *(Step(f"each plus {k}", f"x = [n + {k} for n in x]", lambda x, k=k: [n + k for n in x]) for k in CONSTANTS),
)
TO_NUMBER = (
    Step("the sum", "x = sum(x)", sum),
    Step("the count", "x = len(x)", len),
    Step("the largest or 0", "x = max(x, default=0)", lambda x: max(x, default=0)),
    Step("the smallest or 0", "x = min(x, default=0)", lambda x: min(x, default=0)),
)


@dataclass(frozen=True)
class Function:
    """A function of one argument: its steps, and whether the argument is a list."""

    steps: tuple[Step, ...]
    of_list: bool

    @property
    def head(self) -> str:
        """Signature and description, which a solution continues."""
        start = "a list" if self.of_list else "a number"
        words = ", ".join((start, *(step.words for step in self.steps)))
        return f'def f(x):\n    """{words}"""\n'

    @property
    def body(self) -> str:
        """A right solution."""
        return body_of([step.line for step in self.steps])

    def value(self, argument: Any) -> Any:
        """What it returns."""
        for step in self.steps:
            argument = step.apply(argument)
        return argument


def body_of(lines: list[str]) -> str:
    """Write the body of a function that returns x at its end."""
    return "".join(f"    {line}\n" for line in (*lines, "return x"))


def draw(rng: random.Random) -> Function:
    """Draw a function of two to four steps."""
    numbers = [rng.choice(ON_NUMBERS) for _ in range(rng.randint(2, 3))]
    if rng.random() < 0.5:
        return Function(tuple(numbers), of_list=False)
    lists = [rng.choice(ON_LISTS) for _ in range(rng.randint(0, 2))]
    return Function((*lists, rng.choice(TO_NUMBER), *numbers[1:]), of_list=True)


def argument(rng: random.Random, function: Function) -> Any:
    """Draw an argument for a function."""
    if function.of_list:
        return [rng.randint(-9, 20) for _ in range(rng.randint(0, 6))]
    return rng.randint(-20, 40)


def spoiled(rng: random.Random, function: Function) -> str:
    """Write a solution with one mistake that people make: what it does, what it calls things, or how it is written."""
    lines = [step.line for step in function.steps]
    place = rng.randrange(len(lines))
    kind = rng.choice(("left out", "constant", "name", "syntax", "twice"))
    line = lines[place]
    if kind == "left out":
        del lines[place]
    elif kind == "twice":
        lines.insert(place, line)
    elif kind == "name":
        lines[place] = line.replace("= x", "= y", 1) if "= x" in line else line.replace("(x", "(y", 1)
    elif kind == "syntax":
        lines[place] = line.rstrip(")]0123456789x") or "x ="
    else:
        lines[place] = _other_constant(rng, line)
    return body_of(lines)


def _other_constant(rng: random.Random, line: str) -> str:
    """Replace the digits of a line by others; a line without any does nothing."""
    return "".join(str(rng.choice(CONSTANTS)) if letter in "23456789" else letter for letter in line)
