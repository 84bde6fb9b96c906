"""A parser for the task `reviews`: the constituents of its grammar, without a model, so that parsing is tried there.

Phrases are found level by level, each by a regular expression over the classes of what the level before has left, and
none of them needs the rest of a sentence to be right: what a policy makes up is parsed as far as it goes.

Source:
    Abney, 1996, Partial parsing via finite-state cascades (https://doi.org/10.1017/S1351324997001599).
"""

import re
from collections.abc import Iterator

from apportion.credit.parse import ParseTree, Span
from apportion.data.reviews import grammar

_CLASSES = {
    "J": (*grammar.ADJECTIVE, *grammar.GENRE, *grammar.NEUTRAL, "second"),
    "N": (*grammar.FILM, *grammar.NOUN, *grammar.ASPECT, "cinema", "television", "act", "end", "credits", "hours"),
    "P": grammar.WHO,
    "D": (*grammar.DET, "a", "two"),
    "V": (*grammar.SAW, *grammar.VERB, "was", "found"),
    "R": (*grammar.ADVERB, *grammar.PRAISING, *grammar.BLAMING),
    "O": (*grammar.POSITIVE, *grammar.NEGATIVE),
    "G": grammar.NEGATION,
    "I": ("about", "at", "on", "in", "near", "after", "for"),
}
_CLASS_OF = {word: letter for letter, words in _CLASSES.items() for word in words}
_OTHER = "-"  # punctuation, connectives, and words that the grammar does not have
_CASCADE = tuple(
    (label, re.compile(pattern))
    for label, pattern in (
        ("a", "R*O"),  # very dull
        ("n", "D?J*N+|P"),  # a young sailor
        ("p", "In"),  # at the cinema
        ("v", "G?VG?n?[ap]*"),  # was not very dull
        ("s", "nv"),  # the plot was not very dull
    )
)


def trees(text: str) -> list[ParseTree]:
    """Parse a text of the task `reviews`; a backend of `ConstituencyParse`.

    Args:
        text: Any. Words are what white space separates; a sentence ends with the words `.`, `!` and `?`.

    Returns:
        One tree a sentence, in order, with spans in this text.
    """
    sentences = [([text[start:end] for start, end in words], words) for words in _sentences(text)]
    return [ParseTree(tuple(words), tuple(_nodes(said))) for said, words in sentences]


def _sentences(text: str) -> Iterator[list[Span]]:
    """List the words of each sentence."""
    words: list[Span] = []
    for match in re.finditer(r"\S+", text):
        words.append(match.span())
        if match[0] in (".", "!", "?"):
            yield words
            words = []
    if words:
        yield words


def _nodes(words: list[str]) -> list[Span]:
    """List the nodes of a sentence, parents before their children."""
    line = "".join(_CLASS_OF.get(word, _OTHER) for word in words)
    bounds = list(range(len(words) + 1))  # between the phrases and words of the line
    nodes = [(0, len(words)), *((place, place + 1) for place in range(len(words)))]
    for label, pattern in _CASCADE:
        for match in reversed([*pattern.finditer(line)]):
            start, end = match.span()
            nodes.append((bounds[start], bounds[end]))
            line = line[:start] + label + line[end:]
            del bounds[start + 1 : end]
    return sorted(nodes, key=lambda node: (node[0], -node[1]))
