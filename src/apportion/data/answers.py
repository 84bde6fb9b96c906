"""From what a model wrote to the program that it stands for, and back from a line of it to the characters."""

import re
from dataclasses import dataclass

FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\n`]*)$\n?", re.MULTILINE)
"""A line that opens or closes a block of Markdown."""

CODE = re.compile(
    r"(def|class|import|return|del|assert|global)\b|from [\w.]+ import|(if|for|while|with|elif|else|try|async)\b.*:"
    r"|@\w|[\w.\[\]]+(, *[\w.\[\]]+)* *[-+*/%&|^]{0,2}=[^=]|[\w.]+\(.*\)?\s*$|\"{3}|'{3}"
)
"""How a line of a program begins, and one of prose hardly ever."""


@dataclass(frozen=True)
class Answer:
    """The program that a completion stands for, and where its parts lie in the completion.

    Attributes:
        program: Its source.
        parts: Of each part that the model wrote: where it begins in the program, where in the completion, its length.
    """

    program: str
    parts: tuple[tuple[int, int, int], ...]

    def characters(self, line: int) -> tuple[int, int] | None:
        """Find what the model wrote of a line.

        Args:
            line: Line of the program, from 1.

        Returns:
            Characters of the completion, from and to, without the line's indent and end; None where it wrote nothing
            of it.
        """
        lines = self.program.split("\n")
        if not 1 <= line <= len(lines) or not (text := lines[line - 1].strip()):
            return None
        begin = sum(len(before) + 1 for before in lines[: line - 1]) + lines[line - 1].index(text)
        for start, place, length in self.parts:
            first, last = max(begin, start), min(begin + len(text), start + length)
            if first < last:
                return place + first - start, place + last - start
        return None


def answer(completion: str, head: str = "") -> Answer:
    """Make a program of what a model wrote: its first fenced block, or all of it, behind what it was to continue.

    Program text before a fence, of which that is the end, counts as unfenced: so does a body that goes on in the head.
    Fences inside of a string are none. A block in a list loses the indent of its fence. Behind a head that ends with a
    line, text that begins without indent cannot go on in its body: it stands below it, as where a chat model writes the
    function again.

    Args:
        completion: What the model wrote.
        head: Source that it continues.

    Returns:
        The program.
    """
    start, end, indent = _block(completion, goes_on=bool(head))
    program, parts, place = [head], [], start
    length = len(head)
    for line in completion[start:end].splitlines(keepends=True):
        cut = len(line) - len(line.removeprefix(indent)) if line.startswith(indent) else 0
        parts.append((length, place + cut, len(line) - cut))
        program.append(line[cut:])
        length, place = length + len(line) - cut, place + len(line)
    return Answer(program="".join(program), parts=tuple(parts))


def _block(text: str, *, goes_on: bool) -> tuple[int, int, str]:
    """Find the part of a text that is the program, and the indent that its fence has."""
    fences = [fence for fence in FENCE.finditer(text) if not _ends_in_a_string(text[: fence.start()])]
    if not fences:
        return 0, len(text), ""
    opening, before = fences[0], text[: fences[0].start()]
    if (goes_on and before.strip() and before.lstrip("\n")[0] in " \t") or (not opening[3] and _is_code(before)):
        return 0, opening.start(), ""
    start, mark = opening.end(), opening[2]
    closing = [
        fence for fence in FENCE.finditer(text, start) if not fence[3] and fence[2].startswith(mark)
    ]  # of the same sign, and no shorter
    outside = [fence for fence in closing if not _ends_in_a_string(text[start : fence.start()])]
    return start, min((fence.start() for fence in outside or closing), default=len(text)), opening[1]


def _ends_in_a_string(text: str) -> bool:
    """Tell whether a string over several lines is open at the end of a text."""
    return any(text.count(quotes) % 2 for quotes in ('"""', "'''"))


def _is_code(text: str) -> bool:
    """Tell a program from prose by its first line that is no comment, as headings of Markdown look."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return bool(lines) and CODE.match(lines[0]) is not None
