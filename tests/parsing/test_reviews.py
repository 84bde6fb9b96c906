"""The parser of the task `reviews`, alone and as a backend."""

import random
import re
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion import ConstituencyParse
from apportion.data.reviews import grammar
from apportion.parsing.reviews import _CLASS_OF, trees
from texts import sizes, written

PARSE = ConstituencyParse(cutoff=5, workers=0, backend=trees)


def phrases(text: str) -> list[list[str]]:
    """The nodes of more than one word of each sentence."""
    said = [([text[start:end] for start, end in tree.words], tree.nodes) for tree in trees(text)]
    return [[" ".join(words[first:end]) for first, end in nodes if end - first > 1] for words, nodes in said]


def test_sentences_of_the_grammar_are_divided_into_its_constituents() -> None:
    text = "about a young sailor . they hardly found the music painfully dull , and the plot was not good !"
    assert phrases(text) == [
        ["about a young sailor .", "about a young sailor", "a young sailor"],
        [
            "they hardly found the music painfully dull , and the plot was not good !",
            "they hardly found the music painfully dull",
            "hardly found the music painfully dull",
            "the music",
            "painfully dull",
            "the plot was not good",
            "the plot",
            "was not good",
        ],
    ]


def test_a_phrase_ends_where_the_next_clause_begins_without_punctuation() -> None:
    said = ["the plot was good the cast was bad .", "the plot was good", "the plot", "was good"]
    assert phrases(said[0]) == [[*said, "the cast was bad", "the cast", "was bad"]]
    assert phrases("a long music film") == [["a long music film", "a long music film"]]


@pytest.mark.parametrize("seed", range(20))
def test_each_clause_of_the_grammar_is_a_constituent(seed: int) -> None:
    rng = random.Random(seed)
    clause = grammar._clause(rng, grammar.Mood())
    found = [node for sentence in phrases(f"{clause} , and {clause} ;") for node in sentence]
    assert found.count(clause) == 2


@given(words=st.lists(st.sampled_from([*grammar.vocabulary(), "<unk>", "Ünknown", "\n", "  "]), max_size=40))
def test_whatever_a_policy_writes_is_parsed_whole(words: list[str]) -> None:
    text = " ".join(words)
    found = trees(text)
    assert [text[slice(*word)] for tree in found for word in tree.words] == text.split()
    for tree in found:
        assert tree.nodes[0] == (0, len(tree.words))
        assert {(place, place + 1) for place in range(len(tree.words))} <= {*tree.nodes}
        assert all(other >= end or after <= end for (_, end), (other, after) in combinations(tree.nodes, 2))


def test_macro_actions_are_its_constituents_below_the_cutoff() -> None:
    """By hand: a clause of 5 words and more is divided, single words go to the action before them.

    they hardly found | the music | painfully dull , and | the plot | was not good !
    """
    text = "they hardly found the music painfully dull , and the plot was not good !"
    rollout = written(re.findall(r" ?\S+", text), ["the", " sailor", " <unk>", " ."], [])
    closes = PARSE(rollout)
    assert [sizes(closes[row, :length]) for row, length in ((0, 15), (1, 4))] == [[3, 2, 4, 2, 4], [4]]
    assert not PARSE.fallbacks(rollout).any()


def test_every_word_of_a_continuation_has_a_class() -> None:
    rng = random.Random(0)
    said = chain.from_iterable(grammar.continuation(rng, words=160, mood=grammar.Mood()).split() for _ in range(50))
    assert {*said} - _CLASS_OF.keys() <= {*grammar.PUNCTUATION, *grammar.CONNECTIVE}
