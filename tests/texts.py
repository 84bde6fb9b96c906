"""Rollouts whose tokens are pieces of text, for conditions that read it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from apportion import ParseTree, ResponseTexts, Rollout
from batches import mask_of_lengths, random_rollout, spoiled

NESTED = (("The", "quick", "fox"), ("jumped", ("over", ("the", "lazy", "dog"))), ".")
"""The tree of ma-rlhf.md O6."""
O6 = {2: [9], 3: [9], 4: [5, 4], 5: [4, 5], 6: [3, 6], 7: [3, 6], 8: [3, 6], 9: [3, 6], 10: [9]}
"""Sizes of its actions by cutoff, with one token a word."""


def tree_over(nested: tuple, text: str) -> ParseTree:
    """Lay a tree of words over a text that holds them in order."""
    place = 0

    def span(word: object) -> tuple[int, int]:
        nonlocal place
        start = text.index(str(word), place)
        place = start + len(str(word))
        return start, place

    return ParseTree.of(nested, children=lambda node: node if isinstance(node, tuple) else (), span=span)


def spans_of(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Join pieces, and say where each of them lies."""
    return list(pairwise(accumulate(map(len, pieces), initial=0)))


def written(*rows: Sequence[str], width: int | None = None) -> Rollout:
    """A rollout whose tokens are the given pieces; an empty piece is a special token."""
    mask = mask_of_lengths(*map(len, rows), width=width)
    spans = torch.zeros(*mask.shape, 2, dtype=torch.long)
    for row, pieces in enumerate(rows):
        spans[row, : len(pieces)] = torch.tensor(spans_of(pieces), dtype=torch.long).view(-1, 2)
    return with_spans(mask, tuple(map("".join, rows)), spans)


def with_spans(mask: Tensor, texts: tuple[str, ...], spans: Tensor) -> Rollout:
    return spoiled(replace(random_rollout(mask), text=ResponseTexts(texts=texts, spans=spans)))


def sizes(closes: Tensor) -> list[int]:
    """Count the tokens of each action of a row that is all response."""
    ends = [place + 1 for place, close in enumerate(closes.tolist()) if close]
    return [end - start for start, end in pairwise([0, *ends])]


PIECES = ("the", " film", " is", ".", " good", "\n", "x = (", "1)", " + 2", "def f():", "", "é", "   ")


def with_pieces(rollout: Rollout, seed: int = 0) -> Rollout:
    """Let a rollout say something: each valid token is a random piece of text, one of them a special token."""
    generator, mask = torch.Generator().manual_seed(seed), rollout.response_mask
    drawn = torch.randint(len(PIECES), mask.shape, generator=generator)
    rows = [[PIECES[place] for place in row[valid].tolist()] for row, valid in zip(drawn, mask, strict=True)]
    spans = torch.zeros(*mask.shape, 2, dtype=torch.long)
    spans[mask] = torch.tensor([span for row in rows for span in spans_of(row)], dtype=torch.long).view(-1, 2)
    return replace(rollout, text=ResponseTexts(texts=tuple(map("".join, rows)), spans=spans))
