"""What responses say, and where each sampled token lies in it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from apportion import ResponseTexts, Rollout, with_text
from apportion.batch import Prompts, rows
from apportion.rollout import Responses
from apportion.score.reward_model import decode
from batches import mask_of, mask_of_lengths, random_rollout, without_type_checks

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> PreTrainedTokenizerFast:
    file = str(shared / "data" / "gpt2_tokenizer" / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END, pad_token=END)


def rollout_of(prompts: list[list[int]], responses: list[list[int]], pad: int, *, width: int | None = None) -> Rollout:
    """Pad ids as a sampler does; what stands in the padding is the end-of-text token."""
    longest = max(map(len, prompts))
    mask = mask_of_lengths(*map(len, responses), width=width)
    wide = [row + [pad] * (mask.shape[1] - len(row)) for row in responses]
    return Rollout(
        prompt_ids=torch.tensor([[pad] * (longest - len(row)) + row for row in prompts]),
        prompt_mask=mask_of([[0] * (longest - len(row)) + [1] * len(row) for row in prompts]),
        response_ids=torch.tensor(wide).view(mask.shape).long(),
        response_mask=mask,
        old_logprobs=torch.zeros(mask.shape),
        ref_logprobs=torch.zeros(mask.shape),
        values=torch.zeros(mask.shape),
    )


def pieces(rollout: Rollout, row: int) -> list[str]:
    assert rollout.text is not None
    text, spans = rollout.text.texts[row], rollout.text.spans[row][rollout.response_mask[row]]
    return [text[start:end] for start, end in spans.tolist()]


def test_each_token_lies_where_it_was_sampled(gpt2: PreTrainedTokenizerFast) -> None:
    """ma-rlhf.md section 4 row 8: ids that no tokenizer would give for their text keep their own characters."""
    letters = [token for letter in "cat" for token in gpt2(letter)["input_ids"]]
    end: Any = gpt2.convert_tokens_to_ids(END)
    prompt = gpt2("The")["input_ids"]
    canonical = gpt2(" cat sat.\n\nIt purred")["input_ids"]
    rollout = with_text(rollout_of([prompt] * 4, [letters, canonical, [*canonical, end], [end]], end), gpt2)
    assert rollout.text is not None
    assert rollout.text.texts == ("cat", " cat sat.\n\nIt purred", " cat sat.\n\nIt purred", "")
    assert pieces(rollout, 0) == ["c", "a", "t"]
    assert pieces(rollout, 1) == [" cat", " sat", ".", "\n", "\n", "It", " pur", "red"]
    assert pieces(rollout, 2) == [*pieces(rollout, 1), ""]
    assert pieces(rollout, 3) == [""]
    assert (rollout.text.spans[~rollout.response_mask] == 0).all()


def test_tokens_that_share_a_character_cover_the_whole_of_it(gpt2: PreTrainedTokenizerFast) -> None:
    """Byte-level BPE splits 語 into two tokens; one that the prompt began with is the response's."""
    ids = gpt2("a語b")["input_ids"]
    assert len(ids) == 4
    rollout = with_text(rollout_of([ids[:1], ids[:2]], [ids[1:], ids[2:]], ids[0]), gpt2)
    assert rollout.text is not None
    assert rollout.text.texts == ("語b", "語b")
    assert pieces(rollout, 0) == ["語", "語", "b"]
    assert pieces(rollout, 1) == ["語", "b"]


def test_what_was_not_sampled_is_no_text(gpt2: PreTrainedTokenizerFast) -> None:
    ids = gpt2(" one two three")["input_ids"]
    rollout = rollout_of([ids[:1]], [ids], ids[0])
    rollout = with_text(replace(rollout, response_mask=mask_of([[1, 0, 1]])), gpt2)
    assert rollout.text is not None
    assert rollout.text.texts == (" one three",)
    assert rollout.text.spans.tolist() == [[[0, 4], [0, 0], [4, 10]]]


@given(
    drawn=st.lists(st.tuples(st.lists(st.integers(0, 50256), max_size=12)), min_size=1, max_size=4),
    extra=st.integers(0, 3),
)
def test_any_ids_give_the_text_that_reward_functions_get(gpt2, drawn: list, extra: int) -> None:
    """Spans follow one another without gaps, and padding or other rows change nothing."""
    responses = [row for (row,) in drawn]
    width = max(map(len, responses)) + extra
    rollout = with_text(rollout_of([[464]] * len(responses), responses, 50256, width=width), gpt2)
    assert rollout.text is not None
    prompts = Prompts(prompt_ids=rollout.prompt_ids, prompt_mask=rollout.prompt_mask, texts=[], columns={})
    sampled = Responses(
        response_ids=rollout.response_ids, response_mask=rollout.response_mask, logprobs=rollout.old_logprobs
    )
    assert list(rollout.text.texts) == decode(gpt2, prompts, sampled)
    for row, ids in enumerate(responses):
        text, spans = rollout.text.texts[row], rollout.text.spans[row, : len(ids)].tolist()
        covered = {place for start, end in spans for place in range(start, end)}
        assert covered == set(range(len(text)))
        starts = [start for start, _ in spans]
        assert starts == sorted(starts)
        said = [span for span in spans if span[0] < span[1]]  # a special token may stand inside of a character
        assert said == sorted(said)
        following = [next((s for s, end in spans[t:] if s < end), len(text)) for t in range(len(spans))]
        assert rollout.text.begins[row, : len(ids)].clamp(max=len(text)).tolist() == following
        alone = with_text(rollout_of([[464]], [ids], 50256), gpt2)
        assert alone.text is not None
        assert alone.text.spans[0].tolist() == spans


def test_rows_are_taken_from_texts_too() -> None:
    mask = mask_of_lengths(2, 2, 2)
    text = ResponseTexts(texts=("ab", "cd", "ef"), spans=torch.arange(12).view(3, 2, 2))
    rollout = replace(random_rollout(mask), text=text)
    for index, wanted in ((slice(1, 3), [1, 2]), (torch.tensor([2, 0]), [2, 0])):
        taken = rows(rollout, index)
        assert taken.text is not None
        assert taken.entropies is not None
        assert rollout.entropies is not None
        assert taken.text.texts == tuple(text.texts[row] for row in wanted)
        assert torch.equal(taken.text.spans, text.spans[wanted])
        assert torch.equal(taken.entropies, rollout.entropies[wanted])


def test_what_covers_nothing_begins_where_the_next_token_does() -> None:
    """On the left, in holes, at the end; and a row without text is all behind it."""
    spans = torch.tensor([[[0, 0], [0, 2], [0, 0], [2, 3], [3, 3]], [[0, 0]] * 5])
    text = ResponseTexts(texts=("abc", ""), spans=spans)
    assert text.begins.tolist() == [[0, 0, 2, 2, 3], [3] * 5]
    assert text[1:].begins.tolist() == [[0] * 5]


def test_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="spans has 3 rows; there are 1 texts"):
        ResponseTexts(texts=("a",), spans=torch.zeros(3, 2, 2, dtype=torch.long))
    rollout = random_rollout(mask_of_lengths(3, 2))
    text = ResponseTexts(texts=("a", "b"), spans=torch.zeros(2, 4, 2, dtype=torch.long))
    with without_type_checks(), pytest.raises(ValueError, match=r"text.spans has shape \(2, 4\); response_ids has"):
        replace(rollout, text=text)
    with without_type_checks(), pytest.raises(ValueError, match=r"entropies has shape \(2, 2\); response_ids has"):
        replace(rollout, entropies=torch.zeros(2, 2))
