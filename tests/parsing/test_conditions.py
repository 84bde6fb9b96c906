"""Terminations by parse, on rollouts: rows, padding, fallbacks, several sentences, real programs."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import parsers
from apportion import (
    CodeParse,
    ConstituencyParse,
    CreditConfig,
    EveryToken,
    FixedNgram,
    Rollout,
    Scores,
    Stanza,
    Terminal,
    assign_credit,
    macro_ids,
    with_text,
)
from batches import mask_of, padded, spoiled, without_type_checks
from texts import O6, sizes, written

SENTENCE = ["The", " quick", " fox", " jumped", " over", " the", " lazy", " dog", "."]
PAIRS = ConstituencyParse(cutoff=3, backend=parsers.pairs, workers=0)
MOODY = replace(PAIRS, backend=parsers.moody)
CODE = CodeParse(cutoff=6)


@pytest.fixture(scope="module")
def parse_by_stanza(stanza: Stanza) -> Iterator[ConstituencyParse]:
    """The real thing: a trained parser in a process of its own."""
    condition = ConstituencyParse(backend=stanza, workers=1)
    yield condition
    condition.close()


def segmented(condition, *rows: list[str]) -> list[list[int]]:
    closes = condition(written(*rows))
    return [sizes(closes[place, : len(row)]) for place, row in enumerate(rows)]


def test_o6_through_a_parser_of_stanza_in_another_process(parse_by_stanza: ConstituencyParse) -> None:
    """ma-rlhf.md O6, from response to boundaries."""
    for cutoff in (4, 5, 6, 10):
        assert segmented(replace(parse_by_stanza, cutoff=cutoff, workers=0), SENTENCE) == [O6[cutoff]]
    assert segmented(parse_by_stanza, SENTENCE, [*SENTENCE, "\n", *SENTENCE, "<end>"][:-1]) == [[4, 5], [4, 5, 5, 5]]


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        ([*SENTENCE, ""], [4, 6]),  # an end-of-text token has no text, and belongs to the last word
        (SENTENCE[:4], [4]),  # cut at the limit
        ([*SENTENCE, " It", " was", " not", " good", "."], [4, 5, 1, 4]),
        (
            [*SENTENCE, "\n\n", " It", " was", " not", " good", "."],
            [4, 5, 2, 4],
        ),  # a line break belongs to the next word
        (["\n", *SENTENCE], [5, 5]),
        (["T", "he", " quick", " fox", " jum", "ped", " over", " the", " la", "zy", " dog", "."], [7, 5]),
        (["The quick", " fox jumped", " over the", " lazy", " dog."], [2, 3]),  # of The, fox; over, lazy, dog
        ([""], [1]),
        ([" ", "\n"], [2]),
        ([], []),
    ],
)
def test_responses_as_policies_write_them(pieces: list[str], wanted: list[int], stanza: Stanza) -> None:
    """ma-rlhf.md section 4 rows 6 to 8: nothing here has to fall back. Worked out by hand from O6's tree, cutoff 5."""
    condition = ConstituencyParse(backend=stanza, workers=0)
    rollout = written(pieces, width=len(pieces) + 1)
    assert sizes(condition(rollout)[0, : len(pieces)]) == wanted
    assert not condition.fallbacks(rollout).any()


def test_rows_that_cannot_be_parsed_fall_back_to_tokens_and_are_counted() -> None:
    """ma-rlhf.md section 4 row 7: the official code raises. The second sentence of the last row fails."""
    rows = [["one", " two"], ["fail", " it"], ["nonsense", " is"], ["beyond", " it"], ["a", " b", ".", " fail", " c"]]
    rollout = written(*rows)
    assert segmented(MOODY, *rows) == [[2], [1, 1], [1, 1], [1, 1], [1, 1, 1, 1, 1]]
    assert MOODY.fallbacks(rollout).tolist() == [False, True, True, True, True]


def test_a_batch_of_which_nothing_can_be_parsed_is_told() -> None:
    """A single row may be an odd text, and one that can be parsed shows that the backend works."""
    odd = [["fail", " it"], ["nonsense", " is"]]
    for quiet in ([*odd, ["one"]], odd[:1], [*odd[:1], [], [" "]]):
        assert replace(MOODY).fallbacks(written(*quiet))[0]
    condition = replace(MOODY)
    with pytest.warns(UserWarning, match="none of 2 responses could be parsed, .* as in 'fail it'"):
        assert segmented(condition, [], *odd, ["\n"])[1:3] == [[1, 1], [1, 1]]
    assert segmented(condition, *odd[::-1]) == [[1, 1], [1, 1]]  # told once


def test_each_sentence_begins_an_action_and_is_parsed_on_its_own() -> None:
    """Pairs of words below the cutoff are actions; a single word extends them, but not over the sentence's end."""
    assert segmented(PAIRS, ["a", " b", " c", "!", " d", " e", "?", "\n", "f"]) == [[4, 3, 2]]
    assert segmented(PAIRS, ["a", " b", " c", "!", " d"]) == [[4, 1]]
    assert PAIRS.parts("a b.\n\nc d! e\n") == [(0, "a b."), (6, "c d!"), (11, "e")]


texts = st.lists(
    st.lists(st.sampled_from(["a", " b", " cd", ".", "\n", "", " fail", "x y", " é", "(", "):\n"]), max_size=9),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("condition", [PAIRS, MOODY, CODE], ids=["pairs", "moody", "code"])
@given(rows=texts, left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=25)
def test_rows_alone_and_padding_agree_with_the_batch(condition, rows: list, left: int, right: int) -> None:
    """ma-rlhf.md section 0 and O12, with rows of one token and of padding alone."""
    rollout = written(*rows, ["a"], [])
    closes = condition(rollout)
    ids = macro_ids(closes, rollout.response_mask)
    assert ((ids < 0) == ~rollout.response_mask).all()
    last = rollout.response_mask & (rollout.response_mask.flip(1).cumsum(1).flip(1) == 1)
    assert (closes | ~last).all()
    assert not (closes & ~rollout.response_mask).any()
    wide = padded(rollout, left=left, right=right)
    assert torch.equal(condition(wide)[:, left : left + closes.shape[1]], closes)
    for place, pieces in enumerate(rows):
        alone = written(pieces)
        assert torch.equal(condition(alone)[0], closes[place, : len(pieces)])
        assert condition.fallbacks(alone)[0] == condition.fallbacks(rollout)[place]
    other = spoiled(replace(rollout, response_ids=rollout.response_ids + 1))
    assert torch.equal(condition(other), closes)


def test_tokens_that_were_not_sampled_are_jumped_over() -> None:
    rollout = written(["a", " b", " c", " d"])
    assert rollout.text is not None
    spans = torch.tensor([[[0, 1], [0, 0], [1, 3], [3, 5]]])
    rollout = replace(
        rollout, response_mask=mask_of([[1, 0, 1, 1]]), text=replace(rollout.text, texts=("a b c",), spans=spans)
    )
    assert replace(PAIRS, cutoff=4)(rollout).int().tolist() == [[0, 0, 0, 1]]  # three tokens, one action
    assert PAIRS(rollout).int().tolist() == [[0, 0, 0, 1]]  # the pair a b, extended by c


def test_credit_is_that_of_the_actions() -> None:
    rollout = written(["a", " b", " c", " d"])
    scores = Scores(scores=torch.ones(1))
    credit = assign_credit(rollout, scores, CreditConfig(termination=PAIRS))
    assert credit.macro_ids.tolist() == [[0, 0, 1, 1]]


def test_what_was_begun_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    condition = ConstituencyParse(cutoff=3, backend=parsers.number_of_process, workers=1)
    rollout = written(["a", " b", ".", " c"], ["a", " b", ".", " d"])
    condition.prepare(rollout)
    first = condition(rollout)
    first &= False  # what a caller does to an answer is no matter to the next
    assert condition(rollout).any()
    assert not condition.fallbacks(rollout).any()
    condition.close()
    asked = [line.split(maxsplit=1)[1] for line in (tmp_path / "asked").read_text().splitlines()]
    assert sorted(asked) == ["a b.", "c", "d"]


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> PreTrainedTokenizerFast:
    file = str(shared / "data" / "gpt2_tokenizer" / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def programs(shared: Path, tokenizer: PreTrainedTokenizerFast, limit: int) -> Rollout:
    """Solutions of HumanEval behind their prompts, cut at a limit."""
    with gzip.open(shared / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][:40]
    encoded = {name: tokenizer([row[name] for row in rows])["input_ids"] for name in ("prompt", "canonical_solution")}

    def stack(lists: list[list[int]], flip: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, lists))
        ids = torch.tensor([[50256] * (width - len(x)) + x if flip else x + [50256] * (width - len(x)) for x in lists])
        columns = torch.arange(width).flip(0) if flip else torch.arange(width)
        return ids, columns < torch.tensor([*map(len, lists)])[:, None]

    prompt_ids, prompt_mask = stack(encoded["prompt"], flip=True)
    ids, mask = stack([x[:limit] for x in encoded["canonical_solution"]], flip=False)
    zeros = torch.zeros(ids.shape)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids,
        response_mask=mask,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
    )


@pytest.mark.parametrize("limit", [20, 200])
def test_real_programs_whole_and_cut_off_are_divided(shared: Path, gpt2: PreTrainedTokenizerFast, limit: int) -> None:
    rollout = with_text(programs(shared, gpt2, limit), gpt2)
    condition = CodeParse()
    ids = macro_ids(condition(rollout), rollout.response_mask)
    assert not condition.fallbacks(rollout).any()
    long = rollout.lengths >= 20
    assert (ids.amax(1)[long] > 0).float().mean() > 0.8
    assert (ids.amax(1)[long] + 1 < rollout.lengths[long]).all()


def test_a_program_is_cut_at_its_constituents() -> None:
    pieces = ["def", " add", "(", "x", ",", " y", "):", "\n", " return", " x", " +", " y", "\n"]
    closes = CodeParse(cutoff=6)(written(pieces))[0].tolist()
    joined = "".join(piece + "|" * close for piece, close in zip(pieces, closes, strict=True))
    assert joined == "def add|(x, y):\n return| x + y\n|"


@pytest.mark.parametrize(
    ("backend", "shown"),
    [(Stanza, "<class .*Stanza'>"), ("stanza", "'stanza'"), (None, "None"), (FixedNgram(), r"FixedNgram\(n=5\)")],
)
def test_a_backend_that_does_not_parse_is_refused(backend: Any, shown: str) -> None:
    """Every row would fall back to one action a token, which is another method."""
    with without_type_checks(), pytest.raises(ValueError, match=rf"backend is {shown}; give Stanza\(\), Benepar\(\)"):
        ConstituencyParse(backend=backend)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (Terminal(), r"Terminal\(\), which cannot be called with a text \(missing a required"),
        (lambda: [], r"<function .*, which cannot be called with a text \(too many positional arguments\)"),
    ],
)
def test_a_backend_that_takes_no_text_is_refused(backend: Any, reason: str) -> None:
    with (
        without_type_checks(),
        pytest.raises(ValueError, match=rf"backend is {reason}.*; give Stanza\(\), Benepar\(\)"),
    ):
        ConstituencyParse(backend=backend)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstituencyParse(cutoff=0), "cutoff is 0; choose at least 1 token, 5 for prose and 10 for programs"),
        (lambda: CodeParse(workers=-1), "workers is -1; choose a number of processes, or 0 to parse in this one"),
        (lambda: CodeParse(language="c++"), r"language is 'c\+\+'; give that of a package .* such as python or cpp"),
        (lambda: CodeParse(language="c_sharp").open(), "pip install tree-sitter tree-sitter-c-sharp"),
        (
            lambda: PAIRS(replace(written(["a"]), text=None)),
            r"ConstituencyParse needs Rollout.text, which is None; add it with apportion.with_text\(rollout, tokeni",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cutoff_of_one_extends_a_single_action() -> None:
    """No node has fewer tokens than 1, so that every word extends the first action."""
    rollout = written(["a", " b", " c"])
    assert sizes(replace(PAIRS, cutoff=1)(rollout)[0]) == [3]
    assert not torch.equal(replace(PAIRS, cutoff=1)(rollout), EveryToken()(rollout))
