"""The two rules of MA-RLHF's parsing, by hand, against a slow reference, and on texts as policies write them."""

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import reference
from apportion import ParseTree
from apportion.credit.parse import closing_tokens
from texts import NESTED, O6, spans_of, tree_over


def lengths(closes: list[bool]) -> list[int]:
    """Count the tokens of each action."""
    assert not closes or closes[-1]
    ids = [number - close for number, close in zip(accumulate(closes), closes, strict=True)]
    return reference.sizes(ids)


def cut(nested: tuple, pieces: list[str], cutoff: int) -> list[str]:
    """Segment the pieces of one sentence, and join them to actions."""
    text = "".join(pieces)
    closes = closing_tokens([tree_over(nested, text)], text, spans_of(pieces), cutoff)
    joined = "".join(piece + "|" * close for piece, close in zip(pieces, closes, strict=True))
    return joined.split("|")[:-1]


SENTENCE = ["The", " quick", " fox", " jumped", " over", " the", " lazy", " dog", "."]


@pytest.mark.parametrize(("cutoff", "wanted"), O6.items())
def test_o6_sizes_by_cutoff(cutoff: int, wanted: list[int]) -> None:
    """ma-rlhf.md O6: both rules together are not monotone in the cutoff."""
    assert [len(part.split()) + part.count(".") for part in cut(NESTED, SENTENCE, cutoff)] == wanted
    nested = ((1, 1, 1), (1, (1, (1, 1, 1))), 1)
    assert reference.parse([nested], cutoff) == wanted


def test_tokens_are_counted_not_words() -> None:
    """The noun phrase has 3 words of 4 tokens: at cutoff 4 it is divided, at 5 it is an action (strict <)."""
    pieces = ["The", " qu", "ick", " fox", " jumped", " over", " the", " lazy", " dog", "."]
    assert cut(NESTED, pieces, 4)[0] == "The quick fox jumped over"
    assert cut(NESTED, pieces, 5) == ["The quick fox jumped", " over the lazy dog."]


trees = st.recursive(
    st.integers(0, 4), lambda node: st.lists(node, min_size=1, max_size=4).map(tuple), max_leaves=14
).filter(lambda tree: isinstance(tree, tuple))


def laid_out(forest: list[tuple]) -> tuple[str, list[ParseTree], list[tuple[int, int]]]:
    """Write trees of token counts as a text: a token is a letter; a word without tokens shares one."""
    text, spans, made = "", [], []
    for nested in forest:

        def span(count: Any) -> tuple[int, int]:
            nonlocal text
            start = len(text)
            text += "x" * max(count, 1)
            spans.extend((place, place + 1) for place in range(start, start + count))
            if not count and spans:
                spans[-1] = (spans[-1][0], len(text))
            return start, len(text)

        def children(node: reference.Nested) -> tuple:
            return () if isinstance(node, int) else node

        made.append(ParseTree.of(nested, children=children, span=span))
    return text, made, spans


@given(forest=st.lists(trees, min_size=1, max_size=3), cutoff=st.integers(1, 12))
def test_random_trees_are_cut_as_the_slow_reference_cuts_them(forest: list[tuple], cutoff: int) -> None:
    text, made, spans = laid_out(forest)
    assume(spans and spans[0][0] == 0)  # no token can share a word that comes before all tokens
    assert lengths(closing_tokens(made, text, spans, cutoff)) == reference.parse(forest, cutoff)


def test_text_with_newlines_and_several_sentences_is_cut_on_edges_of_its_sentences() -> None:
    """ma-rlhf.md section 4 row 6: newline tokens were not counted, and later boundaries shifted to the left."""
    pieces = ["\n", *SENTENCE, "\n", "\n", *SENTENCE]
    text = "".join(pieces)
    second = text.rindex("The")
    parsed = [tree_over(NESTED, text), tree_over(NESTED, text[second:]).shifted(second)]
    closes = closing_tokens(parsed, text, spans_of(pieces), 5)
    assert [place for place, close in enumerate(closes) if close] == [4, 9, 15, 20]


def test_ids_that_are_not_canonical_are_cut_by_their_own_characters() -> None:
    """ma-rlhf.md section 4 row 8: only the lengths of a re-tokenised text were compared."""
    pieces = ["T", "h", "e", " ", "quick", " f", "ox", " jum", "ped", " over", " the", " la", "zy", " dog", "."]
    assert cut(NESTED, pieces, 7) == ["The quick fox jumped", " over the lazy dog."]
    assert cut(NESTED, pieces, 8) == ["The quick fox", " jumped over the lazy dog."]


def test_a_piece_belongs_to_the_word_of_its_first_character_that_is_no_space() -> None:
    """The piece "x jumped" is of the noun phrase, ". " of the full stop, "  \\n" of the word behind it."""
    nested = (("a", "fox"), ("jumped", "high"), (".",), ("It", "ran"))
    pieces = ["a", " fo", "x jumped", " high", ". ", " \n", "It", " ran"]
    text = "".join(pieces)
    assert cut(nested, pieces, 4) == ["a fox jumped", " high. ", " \nIt ran"]
    tree = tree_over(nested, text)
    assert [text[start:end] for start, end in tree.words] == ["a", "fox", "jumped", "high", ".", "It", "ran"]


def test_bytes_of_one_character_stay_together() -> None:
    """Two tokens that share a character cover the whole of it; here the accented word of three tokens."""
    text = "un café noir ."
    spans = [(0, 2), (2, 6), (6, 7), (6, 7), (7, 12), (12, 14)]
    tree = tree_over((("un", ("café", "noir")), "."), text)
    assert closing_tokens([tree], text, spans, 5) == [True, False, False, False, False, True]


def test_a_text_that_breaks_off_and_special_tokens_are_cut() -> None:
    """ma-rlhf.md section 4 row 7: a response without end. What no tree covers joins the last word."""
    text = "The quick fox jum"
    tree = tree_over((("The", "quick", "fox"),), text)
    spans = [*spans_of(["The", " quick", " fox", " jum"]), (17, 17)]
    assert closing_tokens([tree], text, spans, 4) == [False, False, False, False, True]


@pytest.mark.parametrize(("text", "spans"), [("", []), ("", [(0, 0)]), (" \n", [(0, 1), (1, 2)])])
def test_a_response_without_words_is_one_action(text: str, spans: list) -> None:
    assert closing_tokens([], text, spans, 5) == [False] * (len(spans) - 1) + [True] * bool(spans)


def test_trees_as_deep_as_a_program_can_be_are_read() -> None:
    nested: tuple = ("x",)
    for _ in range(50_000):
        nested = (nested,)
    tree = ParseTree.of(nested, children=lambda n: n if isinstance(n, tuple) else (), span=lambda _: (0, 1))
    assert closing_tokens([tree], "x", [(0, 1)], 5) == [True]


def test_nodes_without_text_are_left_out() -> None:
    nested = (("a", ""), ("",), "b")
    tree = tree_over(nested, "a b")
    assert tree == ParseTree(words=((0, 1), (2, 3)), nodes=((0, 2), (0, 1), (0, 1), (1, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParseTree(((0, 2), (1, 3)), ()), "give them in order, none empty"),
        (lambda: ParseTree(((2, 2),), ()), "give them in order, none empty"),
        (lambda: ParseTree(((0, 2),), ((0, 2),)), "a node has words 0 to 2; the tree has 1"),
        (lambda: ParseTree(((0, 1), (2, 3)), ((0, 2), (1, 2), (0, 1))), "nodes are out of order"),
        (lambda: ParseTree(((0, 1), (2, 3), (4, 5)), ((0, 3), (0, 2), (1, 3))), "words 1 to 3, of which another ends"),
        (lambda: closing_tokens([ParseTree(((-3, -1), (0, 2)), ((0, 2),))], "short", [(0, 5)], 5), "do not lie one"),
        (lambda: closing_tokens([ParseTree(((0, 9),), ((0, 1),))], "short", [(0, 5)], 5), "do not lie one after the"),
        (lambda: closing_tokens([ParseTree(((0, 3),), ((0, 1),))] * 2, "short", [(0, 5)], 5), "in 5 characters"),
    ],
)
def test_trees_that_lie_on_no_text_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
