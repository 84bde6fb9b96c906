import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.data.reviews import oracle
from apportion.data.reviews.grammar import vocabulary

WORDS = st.lists(st.sampled_from(vocabulary()), max_size=40).map(" ".join)


def score(text: str) -> float:
    return oracle(None, [text])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was good .", 1),
        ("the plot was bad .", -1),
        ("the plot was not good .", -1),
        ("critics never found the plot very dull .", 1),
        ("the plot was not good , and the cast was good .", 0),  # -1 + 1: the comma ends the negation's clause
        ("the plot was not good but the cast was good .", 0),  # so does a connective without a comma
        ("the plot was not never good .", 1),  # two negations cancel
        ("the good plot was not bad .", 2),  # what stands before the negation keeps its sign
        ("another sailor visits a village .", 0),
        ("", 0),
    ],
)
def test_opinions_are_added_and_a_negation_turns_those_after_it_in_its_clause(text: str, expected: float) -> None:
    assert score(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("good " * 60, 60),
        ("not " * 7 + "good", -1),  # an odd number of negations
        ("not good " * 4, 0),  # -1 + 1 - 1 + 1: each negation turns again, in one clause without an end
        (". . not . good", 1),
        ("GOOD plot\nzebra\tgood </s> <unk>", 1),  # unknown words, other white space, marks
    ],
)
def test_degenerate_text_has_a_score_too(text: str, expected: float) -> None:
    assert score(text) == expected


@given(WORDS, WORDS)
def test_the_score_of_a_completion_is_what_it_adds_to_its_prompt(prompt: str, completion: str) -> None:
    whole = f"{prompt} {completion}"
    assert oracle([prompt], [completion])[0] == score(whole) - score(prompt)


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_texts_do_not_change_the_scores_of_one_another(texts: list[str]) -> None:
    assert oracle(None, texts) == [score(text) for text in texts]


def test_the_other_columns_of_a_data_set_are_accepted_and_change_nothing() -> None:
    assert oracle(prompts=["we saw"], completions=["good"], label=[0], other=None) == [1.0]


def test_another_number_of_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        oracle(["a", "b"], ["c"])
