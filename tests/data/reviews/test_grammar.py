import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.data.reviews import grammar, oracle
from apportion.data.reviews.grammar import Mood, continuation, opening, vocabulary

RANDOMS = st.integers(0, 10**6).map(random.Random)
ENDS = {*grammar.PUNCTUATION, *grammar.CONNECTIVE}


@given(RANDOMS)
def test_a_prompt_has_eight_words_none_of_which_could_score_or_turn_a_score(rng: random.Random) -> None:
    words = opening(rng).split()
    assert len(words) == 8
    assert not {*grammar.POSITIVE, *grammar.NEGATIVE, *grammar.NEGATION} & set(words)


@given(RANDOMS, st.integers(1, 200))
def test_a_review_has_the_words_that_were_asked_for_and_ends_with_its_clause(rng: random.Random, words: int) -> None:
    text = continuation(rng, words=words, mood=Mood()).split()
    longest_clause = 12
    assert text[-1] == "."
    assert words - 2 <= len(text) < words + longest_clause  # closing may trade a connective for the full stop
    assert set(text) <= set(vocabulary())


@given(RANDOMS)
def test_a_clause_has_one_opinion_at_most(rng: random.Random) -> None:
    clause = 0
    for word in continuation(rng, words=120, mood=Mood(opinions=1)).split():
        clause = 0 if word in ENDS else clause + (word in {*grammar.POSITIVE, *grammar.NEGATIVE})
        assert clause <= 1


def scores(mood: Mood, count: int = 300) -> list[float]:
    rng = random.Random(0)
    return oracle(None, [continuation(rng, words=150, mood=mood) for _ in range(count)])


def test_a_reviewer_without_a_leaning_scores_zero_on_average() -> None:
    # about 10 opinions of either sign a review: deviation near 3, so the mean of 300 is within 0.7 at four deviations
    assert abs(fmean(scores(Mood()))) < 0.7


def test_a_reviewer_who_approves_of_everything_is_right_about_every_opinion() -> None:
    pleased = scores(Mood(approval=1), count=50)
    assert min(pleased) > 0
    assert [-score for score in pleased] != pleased
    assert max(scores(Mood(approval=0), count=50)) < 0


def test_no_word_is_listed_twice_and_none_holds_a_space() -> None:
    words = vocabulary()
    assert len(words) == len(set(words))
    assert all(word.split() == [word] for word in words)


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"approval is 1\.5"):
        Mood(approval=1.5)
