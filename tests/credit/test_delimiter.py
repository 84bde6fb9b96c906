"""Where a regular expression closes an action."""

import pickle
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Delimiter, Rollout, macro_ids
from apportion.batch import ResponseTexts
from apportion.credit.characters import Characters
from batches import mask_of, padded, spoiled, without_type_checks
from texts import sizes, with_spans, written


def parts(condition: Delimiter, *pieces: str) -> Sequence[str]:
    """Segment one row, and join its pieces to actions."""
    closes = condition(written(pieces))[0].tolist()
    return "".join(piece + "|" * close for piece, close in zip(pieces, closes, strict=True)).split("|")[:-1]


def test_sentences_lines_and_steps_close() -> None:
    pieces = ("Yes", ".", " 1", ".5", " it", " is", "!\n", "\n", "So", " be", " it")
    assert parts(Delimiter(r"[.!?](?=\s)"), *pieces) == ["Yes.", " 1.5 it is!\n", "\nSo be it"]
    assert parts(Delimiter(r"\n"), *pieces) == ["Yes. 1.5 it is!\n", "\n", "So be it"]
    assert parts(Delimiter(r"\n\n"), *pieces) == ["Yes. 1.5 it is!\n\n", "So be it"]


def test_the_token_with_the_last_character_of_a_match_closes() -> None:
    """The match "ab" ends inside the second token, and twice inside the third; an empty match closes nothing."""
    assert parts(Delimiter("ab"), "xa", "bx", "ababx", "x") == ["xabx", "ababx", "x"]
    assert parts(Delimiter("(?=b)"), "a", "b", "c") == ["abc"]


def test_of_tokens_that_share_a_character_the_last_one_closes() -> None:
    spans = torch.tensor([[[0, 1], [1, 2], [1, 2], [2, 3], [3, 3]]])
    rollout = with_spans(mask_of([[1, 1, 1, 1, 1]]), ("a語b",), spans)
    assert Delimiter("語")(rollout).int().tolist() == [[0, 0, 1, 0, 1]]


def slow(rollout: Rollout, pattern: str, row: int) -> list[bool]:
    """Token by token: does it hold the last character of a match that the next token with text does not hold too?"""
    assert rollout.text is not None
    text = rollout.text.texts[row]
    spans = rollout.text.spans[row][rollout.response_mask[row]].tolist()
    ends = {match.end() - 1 for match in re.finditer(pattern, text) if match.end() > match.start()}
    holders = {max(t for t, (start, end) in enumerate(spans) if start <= place < end) for place in ends}
    return [t in holders or t == len(spans) - 1 for t in range(len(spans))]


FOUND = [
    r"\s", r"\S", r"\w", r"\W+", r"\d", r"\D+", ".", ".+", "[ab]", "[^ab]", "[^ab]+", r"[\].\n]", "[.-a]+", r"[\s.]+",
    "[$^]", r"[.$](?=\s)", ".(?=[ab])", r"\S(?=.)", "a", r"\.", r"\n+", "é+", r"\$(?=a)", "a(?=b)", r"\^(?=\])",
    "😀", "-", " ", "\n", " +", ".(?= )", r"[.\]]\s", r"[.\]]+\s", r"[.\]]\s+", r"[.\]]+\s+", r"\S\s", r"\S+ +",
    "a+b", "ab+", r".\n", r".+\n+", r"\s[^\s]", "[ab]b", "[ab][ab]", ".e+", "a|b", "[ab][ab][ab]", "ab(?=e)", "a b|b",
    "a+b+(?=e)", "(?<=[.-]) +", r"(?<=[.$])\s+|\n+", r"\n\n|[.$]\s", r"be \d+\$|[.-] ", "ab|a|abe", "be|[ab]+",
    "[ab]+|be", "[ab]+|b", "aa|ab+|b[^a]", r"\||[|$]a", "a[|]b|e", r"(?<=\S)\s(?=\S)", r"\w+|\s+", "ab|e\u0301",
    r"[.$][\]-]*\s", "ab?e", "ab*", "ab?", "ab*e?s", "a+b?(?=e)", r"\w[ab]*", r"\\s+", r"\\s|-",
]  # fmt: skip
SOMETIMES = ["[ab]+b+", "(?<=a)b|b+", "(?<=a)a+", "a+a", "a+(?=[ab])", "a+|b[ab]", "ab*(?=b)", "ab?b"]
ENGINE = [
    "[ab]*", "[ab]?", "[ab]{2}", "[ab]++", "[]a]", "[^]a]", "[a[]", "]", r"\b", "^", "$", "(?i)[a]", "(.)", ".+(?=a)?",
    "a*b", "a?b", "(?<=a)b?e", "ab*?", "ab??", "ab*+", "ab?+", "b|a*b", "a|b*",
    ".(?!a)", ".(?<=a)", r"\x41", r"\101", r"\A", ".(?=a|b)", ".(?=a+)", "(?=a)", "a+?b", "a++b", "ab+?", "ab++",
    "a|", "|a", "a||b", "(?:a|b)", "(?<!a)b", "(?<=ab)b", "(?<=a|b)e", "a|(b)", "a|b$", "(?<=a)",
    r"\. ", "ab", "\n\n", r"\n\n", r"\\s", "abes", "[ab]c|defghij", "|".join(33 * "a"),
]  # fmt: skip


@settings(max_examples=40)  # each of 80 expressions
@given(text=st.text(st.sampled_from("abes\\\u0301]^[.-$ \n\r\t\0\x85é\u2028٣😀\ud800"), max_size=30))
def test_kinds_of_characters_are_found_where_the_engine_finds_them(text: str) -> None:
    rows = (text, "", text[::-1])
    places = torch.arange(len(text))
    spans = torch.stack([places, places + 1], 1)
    texts = ResponseTexts(texts=rows, spans=torch.stack([spans, torch.zeros_like(spans), spans]))
    for pattern in FOUND + SOMETIMES:
        characters = Characters.of(pattern)
        assert characters is not None
        found = characters.end_in(texts)
        if found is None:
            assert pattern in SOMETIMES  # where the next test says
            continue
        for row, said in enumerate(rows):
            matches = [*re.finditer(pattern, said)]
            ends = {match.end() - 1 for match in matches}
            assert found[row].tolist() == [place in ends for place in range(len(text))], pattern
            assert all(match[0].startswith(characters.opening) for match in matches), pattern


@pytest.mark.parametrize(
    ("pattern", "opening"),
    [
        (r"\n", "\n"),
        ("\n+", "\n"),
        (r"Step \d+:", "Step "),
        (r"\.\s", "."),
        ("ab*c", "a"),
        ("ab+c", "ab"),
        (r"\*\|a?", "*|"),
        ("(?<=a)bc ?", "bc"),
        ("語x+", "語x"),
        ("a|ab", ""),
        ("[a]b", ""),
        (".a", ""),
        (r"\da", ""),
    ],
)
def test_expressions_with_a_plain_beginning_that_is_rare_are_left_to_the_engine(pattern: str, opening: str) -> None:
    characters = Characters.of(pattern)
    assert characters is not None
    assert characters.opening == opening
    filling = "z" * (64 - len(opening))
    assert not characters.are_rare((filling, opening))
    assert characters.are_rare((filling, opening + "z")) == bool(opening)


def test_threads_that_find_out_the_kinds_of_the_same_characters_agree() -> None:
    """All begin at once, with a table that knows none of them."""
    starts, places = range(4), torch.arange(300)
    spans = torch.stack([places, places + 1], 1)[None]
    texts = ["".join(chr(0x4E00 + 41 * place) for place in range(start, start + 300)) for start in starts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(texts)) as pool:
            for number in range(100):
                characters, barrier = Characters.of(rf"[.{chr(0x1000 + number)}]|\n"), Barrier(len(texts))
                assert characters is not None
                assert characters.end_in(ResponseTexts(texts=("a.",), spans=spans[:, :2])) is not None

                def ends(text: str, characters: Characters = characters, barrier: Barrier = barrier) -> Any:
                    barrier.wait()
                    return characters.end_in(ResponseTexts(texts=(text,), spans=spans))

                assert not any(found is None or found.any() for found in pool.map(ends, texts))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("pattern", "text", "is_found"),
    [
        (r"\n\n|[.!?]\s", "Yes.\n\nNo!\n\n\n", True),
        (r"(?<=[.!?])\s+|\n+", "Yes. \n\n No!\n \n", True),
        (r"Step \d+:|[.!?] ", "Step 12: so. Step 3: ", True),
        ("aa|ab", "aaaab", True),
        ("[ab]+c|d", "ababcdab", True),
        ("ab|abe", "abe" * 50, True),  # of two that begin together the first
        (r"\s+\n", "a  b", True),  # no character is both
        (r"\s+\n", "a \n", False),  # the run would have to give the line's end back
        ("a+b?a", "aba aa", False),  # so might it where what follows is missing
        ("(?<=[ab])b+", "bbb", False),  # matches at the second
        ("[ab]+|b", "abba", True),  # the second lies inside of the first, the third behind the second's end, too
        ("ab|[bc]+", "abc", False),  # "ab", and then "c"
    ],
)
def test_matches_that_overlap_are_told_apart_or_left_to_the_engine(pattern: str, text: str, is_found: bool) -> None:
    characters = Characters.of(pattern)
    assert characters is not None
    places = torch.arange(len(text))
    found = characters.end_in(ResponseTexts(texts=(text,), spans=torch.stack([places, places + 1], 1)[None]))
    assert (found is not None) == is_found
    ends = {match.end() - 1 for match in re.finditer(pattern, text)}
    expected = [place in ends or place == len(text) - 1 for place in range(len(text))]
    assert Delimiter(pattern)(written([*text]))[0].tolist() == expected


def test_what_is_known_of_characters_outlasts_inference_and_other_devices() -> None:
    condition = Delimiter(r"[\sq]")
    with torch.inference_mode():
        assert parts(condition, "a", " ", "b") == ["a ", "b"]
    assert parts(condition, "c", "q", "d", " ") == ["cq", "d "]
    rollout = written(["x", " ", "y"])
    with torch.device("meta"):
        closes = condition(rollout)
    assert closes.tolist() == [[False, True, True]]
    assert pickle.loads(pickle.dumps(condition)) == condition
    assert len(pickle.dumps(condition)) < 1000


def test_all_other_expressions_are_left_to_the_engine() -> None:
    for pattern in ENGINE:
        re.compile(pattern)
        assert Characters.of(pattern) is None, pattern


@given(
    drawn=st.lists(st.lists(st.sampled_from(["a", "b", ".", " ", "", "é", "ab.", "\n"]), max_size=9), max_size=4),
    pattern=st.sampled_from(["a", r"\.", r"[ab]+\.?", r"\s", "ab", "(?<=a)b", "\\n\\n", *FOUND, *SOMETIMES]),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
def test_batches_rows_and_padding_agree_with_the_slow_loop(drawn: list, pattern: str, left: int, right: int) -> None:
    rows = [*drawn, [""], []]
    rollout, condition = written(*rows), Delimiter(pattern)
    closes = condition(rollout)
    for row, pieces in enumerate(rows):
        assert closes[row, : len(pieces)].tolist() == slow(rollout, pattern, row)
        if pieces:
            assert condition(written(pieces))[0].tolist() == closes[row, : len(pieces)].tolist()
    wide = padded(rollout, left=left, right=right)
    assert torch.equal(condition(wide)[:, left : left + closes.shape[1]], closes)
    ids = macro_ids(closes, rollout.response_mask)
    assert ((ids < 0) == ~rollout.response_mask).all()
    assert torch.equal(condition(spoiled(replace(rollout, response_ids=rollout.response_ids + 1))), closes)


def test_holes_and_padding_on_the_left_are_not_read() -> None:
    rollout = written(["a", "b", "a", "b"])
    assert rollout.text is not None
    holes = replace(rollout, response_mask=mask_of([[1, 0, 1, 1]]))
    spans = torch.tensor([[[0, 1], [0, 0], [1, 2], [2, 3]]])
    holes = replace(holes, text=replace(rollout.text, texts=("aab",), spans=spans))
    assert Delimiter("a")(holes).int().tolist() == [[1, 0, 1, 1]]
    assert sizes(Delimiter("b")(written(["a", "b", "a"]))[0]) == [2, 1]


def test_a_rollout_without_text_is_refused() -> None:
    rollout = replace(written(["a"]), text=None)
    message = r"Delimiter needs Rollout.text, which is None; add it with apportion.with_text\(rollout, tokenizer\)"
    with pytest.raises(ValueError, match=message):
        Delimiter("a")(rollout)


@pytest.mark.parametrize("pattern", [5, b"x", ["a"]])
def test_what_is_no_text_is_refused(pattern: Any) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=r"pattern is .*; give a regular expression as text"):
        Delimiter(pattern)


def test_what_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern is '\(', which is no regular expression \(.*\); mend it, or escape"):
        Delimiter("(")
