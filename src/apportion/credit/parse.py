"""Macro actions from parse trees: MA-RLHF's two rules, for one response at a time.

Trees and texts lie on the host, and the rules visit nodes one after the other, so nothing here is a tensor. The package
`parsing` makes the trees and puts the rows together.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, TypeVar

Span = tuple[int, int]
"""Start and end, in characters of a text."""

Node = TypeVar("Node")


@dataclass(frozen=True)
class ParseTree:
    """A tree over some words of a text.

    Attributes:
        words: Span of each leaf, in the order of the text. Leaves without text are left out.
        nodes: First word of each node and the one after its last, parents before their children, children in order;
            leaves are nodes too.

    Raises:
        ValueError: If words overlap or run backwards, a node has no words of this tree, or nodes are out of order or
            cross each other.
    """

    words: tuple[Span, ...]
    nodes: tuple[Span, ...]

    def __post_init__(self) -> None:
        """Refuse what is no tree over a text."""
        places = [place for word in self.words for place in word]
        if places != sorted(places) or any(start == end for start, end in self.words):
            raise ValueError(f"the words of a tree have spans {self.words}; give them in order, none empty")
        bad = next((node for node in self.nodes if not 0 <= node[0] < node[1] <= len(self.words)), None)
        if bad is not None:
            raise ValueError(f"a node has words {bad[0]} to {bad[1]}; the tree has {len(self.words)}")
        if any((one[0], -one[1]) > (other[0], -other[1]) for one, other in pairwise(self.nodes)):
            raise ValueError("nodes are out of order; list each before its children, and children from left to right")
        around: list[int] = []  # ends of the nodes that a node lies in, the innermost last
        for first, end in self.nodes:
            while around and around[-1] <= first:
                around.pop()
            if around and end > around[-1]:
                raise ValueError(f"a node has words {first} to {end}, of which another ends at {around[-1]}; nest them")
            around.append(end)

    @classmethod
    def of(cls, root: Node, *, children: Callable[[Node], Sequence[Node]], span: Callable[[Node], Span]) -> Self:
        """Read a tree of another library, of any depth.

        Args:
            root: Its root.
            children: From a node to its children in order; none for a leaf.
            span: From a leaf to its characters; called once a leaf, in order. Empty for a leaf without text.

        Returns:
            The same tree, without the nodes that have no text.
        """
        words: list[Span] = []
        nodes: list[list[int]] = []
        waiting: list[tuple[Node | None, int]] = [(root, 0)]
        while waiting:
            node, place = waiting.pop()
            if node is None:  # all below that node has been read
                nodes[place][1] = len(words)
                continue
            waiting.append((None, len(nodes)))
            nodes.append([len(words), 0])
            if below := children(node):
                waiting += [(child, 0) for child in reversed(below)]
            else:
                words += [found] if (found := span(node))[0] < found[1] else []
        return cls(tuple(words), tuple((first, end) for first, end in nodes if first < end))

    def shifted(self, by: int) -> Self:
        """Return the same tree over a text that begins so many characters earlier."""
        return type(self)(tuple((start + by, end + by) for start, end in self.words), self.nodes)


def closing_tokens(trees: Sequence[ParseTree], text: str, spans: Sequence[Span], cutoff: int) -> list[bool]:
    """Say after which tokens a macro action ends.

    Depth first, with counts in tokens of the policy:

        visit(node):
            one word           extends the last action, whichever rule made it; opens one if there is none   (rule 2)
            tokens < cutoff    is an action                                                                  (rule 1)
            otherwise          visit its children, in order

    So both rules together are not monotone: a cutoff that no inner node stays below leaves one action of single words.
    Each tree begins an action: none goes on over the end of a sentence. A node whose words own no token begins none.

    A token belongs to the word that holds its first non-space character. One that holds none, or whose character is in
    no word, belongs to the next word; behind the last word, to that.

    Args:
        trees: Trees over the text, in order.
        text: What the tokens say.
        spans: Characters of each token, in order; may be empty.
        cutoff: Tokens from which on a node is divided.

    Returns:
        One answer a token, the last one True.

    Raises:
        ValueError: If the trees overlap, or run backwards, or go beyond the text.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2, parsing-based termination.
    """
    words = [word for tree in trees for word in tree.words]
    inside = not words or (words[0][0] >= 0 and words[-1][1] <= len(text))
    if not inside or any(before[1] > after[0] for before, after in pairwise(words)):
        raise ValueError(f"trees with words {words[:3]} ... do not lie one after the other in {len(text)} characters")
    if not words:
        return [False] * (len(spans) - 1) + [True] * bool(spans)
    ends = [end for _, end in words]
    owners = [min(bisect_right(ends, _first_letter(text, *span)), len(words) - 1) for span in spans]
    opens = list(_openings(trees, owners, cutoff))
    actions = [bisect_right(opens, owner) for owner in owners]
    return [one != other for one, other in pairwise(actions)] + [True] * bool(actions)


def _openings(trees: Sequence[ParseTree], owners: Sequence[int], cutoff: int) -> Iterator[int]:
    """List the words with which actions begin, in order; `owners` holds the word of each token."""
    shift = 0
    for tree in trees:
        yield shift
        settled = 0
        for first, end in tree.nodes:
            tokens = bisect_left(owners, shift + end) - bisect_left(owners, shift + first)
            if first < settled or (end - first > 1 and tokens >= cutoff):
                continue  # it lies inside of a node that is settled, or its children follow
            settled = end
            if end - first > 1 and tokens:
                yield shift + first
        shift += len(tree.words)


def _first_letter(text: str, start: int, end: int) -> int:
    """Find the first character of a token that is no space; without one, its beginning."""
    said = text[start:end]
    return start + (len(said) - len(said.lstrip()) if said.strip() else 0)
