"""Prompts are encoded once, refused early, and dealt in an order that depends on the seed alone."""

import inspect
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from apportion.data.prompts import PromptSet, encode_prompts, indices_of

TEXTS = ["the film", "plot is very dull", "good"]


def encoded(texts: list, tokenizer: PreTrainedTokenizerFast, limit: int = 8, **columns: list) -> PromptSet:
    return encode_prompts(Dataset.from_dict({"prompt": texts} | columns), tokenizer, max_prompt_length=limit)


@pytest.fixture
def closing() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a beginning and an end around each text, as many models' do."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "good": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def test_text_is_encoded_and_batched_with_its_padding_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = encoded(TEXTS, tokenizer).batch([1, 2])
    assert batch.prompt_ids.tolist() == [[6, 7, 10, 13], [0, 0, 0, 11]]
    assert batch.prompt_mask.tolist() == [[True] * 4, [False, False, False, True]]
    assert batch.texts == TEXTS[1:]


def test_a_prompt_begins_as_texts_do_and_is_not_ended(closing: PreTrainedTokenizerFast) -> None:
    assert encoded(["good good"], closing).ids == [[0, 2, 2]]


def test_an_end_that_the_user_wrote_stays(closing: PreTrainedTokenizerFast) -> None:
    assert encoded(["good </s>"], closing).ids == [[0, 2, 1, 1]]


def test_chat_messages_go_through_the_template_up_to_the_assistants_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}is{% endif %}"
    )
    messages = [{"role": "the", "content": "good film"}]
    found = encoded([messages], chat)
    assert found.ids == [[4, 11, 5, 7]]
    assert found.texts == [messages]


def test_chat_messages_without_a_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ValueError, match=r"the prompt of row 0 is a list of messages, but the tokenizer has no chat templ"
    ):
        encoded([[{"role": "the", "content": "good film"}]], tokenizer)


def test_other_columns_stay_beside_their_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    found = encoded([*TEXTS, "the " * 9], tokenizer, answer=[1, 2, 3, 4], completions=["a", "b", "c", "d"])
    assert found.batch([2, 0]).columns == {"answer": [3, 1]}
    assert found.dropped == 1


def test_prompts_that_are_too_long_are_dropped_and_counted_or_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    found = encoded(TEXTS, tokenizer, limit=2)
    assert (found.texts, found.dropped) == (["the film", "good"], 1)
    data = Dataset.from_dict({"prompt": TEXTS})
    with pytest.raises(ValueError, match=r"1 of 3 prompts .* max_prompt_length \(2\), first row 1 with 4 tokens"):
        encode_prompts(data, tokenizer, max_prompt_length=2, strict=True)
    with pytest.raises(ValueError, match=r"3 of 3 prompts are longer"):
        encode_prompts(data, tokenizer, max_prompt_length=0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": []}, "the data set is empty"),
        ({"text": ["a"], "label": [1]}, "no column 'prompt'; its columns are text, label"),
        ({"prompt": ["good", ""]}, "the prompt of row 1 is empty"),
        ({"prompt": ["good", "  \n"]}, "the prompt of row 1 is empty"),
        ({"prompt": ["good", None]}, "the prompt of row 1 is empty"),
        ({"prompt": [3, 4]}, "the prompt of row 0 is 3"),
    ],
)
def test_data_that_cannot_be_used_are_refused_with_what_is_wrong(
    columns: dict[str, list[Any]], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompts(Dataset.from_dict(columns), tokenizer, max_prompt_length=8)


def test_a_stream_is_refused_with_a_way_out(tokenizer: PreTrainedTokenizerFast) -> None:
    stream: Any = Dataset.from_dict({"prompt": TEXTS}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"given as IterableDataset; give a datasets\.Dataset"):
        inspect.unwrap(encode_prompts)(stream, tokenizer, max_prompt_length=8)


def test_text_that_leaves_no_token_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"good": 0, "<pad>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.normalizer = normalizers.Replace("dull", "")
    with pytest.raises(ValueError, match="the prompt of row 1 has no tokens"):
        encoded(["good", "dull"], PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"))


def test_a_tokenizer_without_padding_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match="no padding token; set one"):
        encoded(TEXTS, bare)


@given(size=st.integers(1, 12), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_pass_over_the_data_holds_every_prompt_once(size: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * size // batch_size)
    dealt = [index for step in range(steps) for index in indices_of(step, batch_size, seed, size)]
    for epoch in range(3):
        assert Counter(dealt[epoch * size : (epoch + 1) * size]) == Counter(range(size))


def test_the_order_depends_on_the_seed_and_on_the_pass() -> None:
    orders = [indices_of(step, 20, seed, 20) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert indices_of(0, 20, 0, 20) == orders[0]
