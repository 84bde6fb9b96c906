"""Scores are those of transformers' own classification head, and what comes with them belongs to the same position."""

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import apportion.score.attention
from apportion import Attention
from apportion.batch import NOTHING, AttentionRequest, Needs, Prompts, Scores
from apportion.rollout import Responses
from apportion.score.function_reward import FunctionReward
from apportion.score.reward_model import RewardModel, decode
from families import EOS, PAD, classifier, prompts_of

BOTH = Needs(attention=AttentionRequest(), prefix_scores=True)
PROMPTS = ([5, 6, 7, 8], [20, 21], [30, 31, 32], [9])
RESPONSES = ([11, 12, 13, EOS], [14, EOS], [15, 16, 17, 18, 19], [EOS])
READABLE = ("the film is good </s>", "plot was not very dull and bad </s>", "the </s>", "good good .")


def responses_of(*rows: list[int], pad: int = PAD) -> Responses:
    width = max(map(len, rows))
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return Responses(response_ids=ids, response_mask=mask, logprobs=torch.zeros(mask.shape))


def reward_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> RewardModel:
    return RewardModel(model, tokenizer, tokenizer, **options)


def padded_texts(side: str, pad: int) -> tuple[Tensor, Tensor]:
    """Prompts and responses as one padded batch, as transformers' models get them."""
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    width = max(map(len, rows))
    gaps = [([pad] * (width - len(row)), [0] * (width - len(row))) for row in rows]
    left = side == "left"
    ids = [gap + row if left else row + gap for (gap, _), row in zip(gaps, rows, strict=True)]
    mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for (_, gap), row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "mistral", "gptj"])
@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_equal_those_of_the_classification_head(
    family: str, pad: int, side: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = classifier(family, pad_token_id=pad)
    found = reward_of(model, tokenizer)(prompts_of(*PROMPTS), responses_of(*RESPONSES, pad=pad)).scores
    ids, mask = padded_texts(side, pad)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        theirs = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_attention_is_the_row_of_the_position_whose_score_is_read(pad: int, tokenizer: PreTrainedTokenizerFast) -> None:
    # abc.md section 10, rows 2 and 4: the row of a pad token, or that of EOS while the score was read before it.
    model = classifier("llama", pad_token_id=pad)
    found = reward_of(model, tokenizer)(prompts_of(*PROMPTS), responses_of(*RESPONSES, pad=pad), BOTH)
    assert found.attention is not None
    assert found.prefix_scores is not None
    eager = classifier("llama", pad_token_id=pad)
    eager.set_attn_implementation("eager")
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        text = prompt + response
        read = max(place for place, token in enumerate(text) if token != pad)
        with torch.no_grad():
            maps = eager(torch.tensor([text]), output_attentions=True).attentions
        wanted = maps[-1][0].mean(0)[read][len(prompt) :]
        torch.testing.assert_close(found.attention[row, : len(response)], wanted, atol=1e-5, rtol=1e-5)
        assert (found.attention[row, len(response) :] == 0).all()
        torch.testing.assert_close(found.scores[row], found.prefix_scores[row, read - len(prompt) + 1])


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj"])
@pytest.mark.parametrize(("row", "layer", "heads"), [("mean", None, None), ("last", 0, (1, 2)), ("read", -1, (3,))])
def test_row_layer_and_heads_of_the_attention_are_those_asked_for(
    row: Any,
    layer: int | None,
    heads: tuple[int, ...] | None,
    family: str,
    pad: int,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    needs = Attention(row=row, layer=layer, heads=heads).needs
    model = classifier(family, pad_token_id=pad)
    found = reward_of(model, tokenizer)(prompts_of(*PROMPTS), responses_of(*RESPONSES, pad=pad), needs).attention
    assert found is not None
    eager = classifier(family, pad_token_id=pad)
    eager.set_attn_implementation("eager")
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        text = prompt + response
        read = max(place for place, token in enumerate(text) if token != pad)
        with torch.no_grad():
            maps = eager(torch.tensor([text]), output_attentions=True).attentions[-1 if layer is None else layer][0]
        maps = (maps if heads is None else maps[list(heads)]).float().mean(0)[: read + 1]
        wanted = maps[read, len(prompt) :]
        if row == "last" and read < len(prompt):
            wanted = torch.zeros(len(response))  # no response token is read
        if row == "mean":
            columns = [maps[max(j, len(prompt)) :, j] for j in range(len(prompt), len(text))]
            wanted = torch.stack([column.mean() if len(column) else torch.tensor(0.0) for column in columns])
        torch.testing.assert_close(found[b, : len(response)], wanted, atol=1e-5, rtol=1e-5)
        assert (found[b, len(response) :] == 0).all()


@pytest.mark.parametrize("row", ["mean", "last"])
def test_rows_of_the_response_are_found_behind_a_template(
    row: Any, reward_model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The template's own tokens, after the response, are no rows; the text is read as one without a template is."""
    needs = Attention(row=row).needs
    plain = reward_of(reward_model, tokenizer)
    by_tokens = plain(*readable(tokenizer), needs).attention
    plain.same_tokens = False
    by_text = plain(*readable(tokenizer), needs).attention
    closed = RewardModel(
        reward_model, tokenizer, tokenizer, template=lambda prompt, response: f"{prompt}{response} and dull"
    )
    prompts, responses = readable(tokenizer)
    texts = [
        str(tokenizer.decode(ids[mask])) for ids, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
    ]
    behind = closed(replace(prompts, texts=texts), responses, needs).attention
    assert by_tokens is not None
    assert by_text is not None
    assert behind is not None
    torch.testing.assert_close(by_text, by_tokens, atol=1e-5, rtol=1e-5)
    without_end = [b for b, text in enumerate(READABLE) if not text.endswith("</s>")]
    assert without_end
    for b in without_end:
        torch.testing.assert_close(behind[b], by_tokens[b], atol=1e-5, rtol=1e-5)


def test_a_layer_or_head_that_is_not_there_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    reward = reward_of(classifier("llama"), tokenizer)
    for redistribution, message in (
        (Attention(layer=5), r"layer 5 is not an attention layer of .*: choose one of \[0, 1\]"),
        (Attention(heads=(0, 7)), r"heads is \(0, 7\), the attention layer has heads 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            reward.check(redistribution.needs)
        with pytest.raises(ValueError, match=message):
            reward(prompts_of(*PROMPTS), responses_of(*RESPONSES), redistribution.needs)


def test_prefix_scores_are_the_scores_of_the_text_cut_there(tokenizer: PreTrainedTokenizerFast) -> None:
    model = classifier("llama")
    prompts, responses = prompts_of(*PROMPTS), responses_of(*RESPONSES)
    found = reward_of(model, tokenizer)(prompts, responses, BOTH).prefix_scores
    assert found is not None
    assert found.shape == (4, 6)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for cut in range(len(response) + 1):
            with torch.no_grad():
                alone = model(torch.tensor([prompt + response[:cut]])).logits[0, 0]
            torch.testing.assert_close(found[row, cut], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_the_answers_for_a_row_depend_neither_on_its_batch_nor_on_the_budget(
    budget: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    # ma-rlhf.md section 4, row 25: scores were read at the prompt length of another row.
    reward = reward_of(classifier("llama"), tokenizer, budget=budget)
    together = reward(prompts_of(*PROMPTS), responses_of(*RESPONSES), BOTH)
    assert together.attention is not None
    assert together.prefix_scores is not None
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = reward(prompts_of(prompt), responses_of(response), BOTH)
        assert alone.attention is not None
        assert alone.prefix_scores is not None
        torch.testing.assert_close(alone.scores[0], together.scores[row])
        for x, y in ((alone.attention, together.attention), (alone.prefix_scores, together.prefix_scores)):
            torch.testing.assert_close(x[0], y[row, : x.shape[1]], atol=1e-6, rtol=1e-5)


def readable(tokenizer: PreTrainedTokenizerFast) -> tuple[Prompts, Responses]:
    """Prompts and responses that the tokenizer reads back from their text."""
    prompts = prompts_of(*(tokenizer(text)["input_ids"] for text in ("the plot", "film is", "very bad", "was")))
    return prompts, responses_of(*(tokenizer(text)["input_ids"] for text in READABLE))


def test_text_gives_the_same_answers_as_tokens_where_both_can_be_read(
    reward_model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    reward = reward_of(reward_model, tokenizer)
    by_tokens = reward(*readable(tokenizer), BOTH)
    reward.same_tokens = False
    by_text = reward(*readable(tokenizer), BOTH)
    torch.testing.assert_close(by_text.scores, by_tokens.scores, atol=1e-5, rtol=1e-5)
    assert by_text.attention is not None
    assert by_tokens.attention is not None
    torch.testing.assert_close(by_text.attention, by_tokens.attention, atol=1e-5, rtol=1e-5)
    assert by_text.prefix_scores is not None
    assert by_tokens.prefix_scores is not None
    lengths = readable(tokenizer)[1].response_mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(
            by_text.prefix_scores[row, : length + 1], by_tokens.prefix_scores[row, : length + 1], atol=1e-5, rtol=1e-5
        )


def test_a_template_makes_the_model_read_the_text_that_it_returns(
    reward_model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts, responses = readable(tokenizer)
    prompts = Prompts(
        prompt_ids=prompts.prompt_ids, prompt_mask=prompts.prompt_mask, texts=["x", "y", "z", "w"], columns={}
    )

    def template(prompt: str, response: str) -> str:
        return f"the film {prompt} . {response} and very dull"

    reward = RewardModel(reward_model, tokenizer, tokenizer, template=template)
    assert not reward.same_tokens
    found = reward(prompts, responses).scores
    for row, (prompt, text) in enumerate(zip(prompts.texts, READABLE, strict=True)):
        ids = tokenizer(template(prompt, text.removesuffix(" </s>")))["input_ids"]
        ended = [tokenizer.eos_token_id] if text.endswith("</s>") else []
        with torch.no_grad():
            scores = [reward_model(torch.tensor([ids + end])).logits[0, 0] for end in ([], ended)]
        assert min(float((found[row] - score).abs()) for score in scores) < 1e-5


@pytest.mark.parametrize("needs", [NOTHING, Needs(prefix_scores=True)])
def test_no_attention_is_computed_when_nobody_needs_it(
    needs: Needs, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """abc.md section 10 row 19: every method paid for the maps of all layers."""
    monkeypatch.setattr(apportion.score.attention, "attention_row", None)  # to call it is an error
    reward = reward_of(classifier("llama"), tokenizer)
    found = reward(prompts_of(*PROMPTS), responses_of(*RESPONSES), needs)
    assert found.attention is None
    assert (found.prefix_scores is not None) is needs.prefix_scores
    with pytest.raises(TypeError):
        reward(prompts_of(*PROMPTS), responses_of(*RESPONSES), BOTH)


def test_bfloat16_models_give_finite_float32_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    """ma-rlhf.md section 4 row 23 and abc.md section 10 row 18, in bfloat16."""
    found = reward_of(classifier("llama", torch.bfloat16), tokenizer)(
        prompts_of(*PROMPTS), responses_of(*RESPONSES), BOTH
    )
    for x in (found.scores, found.attention, found.prefix_scores):
        assert x is not None
        assert x.dtype == torch.float32
        assert x.isfinite().all()


def test_scores_carry_no_gradient_and_a_training_model_is_put_into_evaluation_mode(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """abc.md section 10 row 19: the reward model ran with gradients on."""
    model = classifier("gpt2", resid_pdrop=0.5).train()
    reward = reward_of(model, tokenizer)
    first, second = (reward(prompts_of(*PROMPTS), responses_of(*RESPONSES), BOTH) for _ in range(2))
    assert torch.equal(first.scores, second.scores)
    assert not first.scores.requires_grad


def test_a_score_that_is_not_a_number_is_refused_with_its_row(tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = classifier("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[16] = math.nan  # only the third response holds token 16
    with pytest.raises(ValueError, match=r"the reward model returned nan for response 2 \(1 such of 4\)"):
        reward_of(model, tokenizer)(prompts_of(*PROMPTS), responses_of(*RESPONSES))


def test_a_reward_model_of_two_labels_is_refused(tokenizer: PreTrainedTokenizerFast, tiny_config: LlamaConfig) -> None:
    config = LlamaConfig.from_dict(tiny_config.to_dict() | {"num_labels": 2})
    with pytest.raises(ValueError, match="has 2 labels; give a sequence classifier with one"):
        reward_of(LlamaForSequenceClassification(config), tokenizer)


def test_a_function_gets_prompts_completions_and_columns_by_keyword(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list, completions: list, *, answer: list, **columns: list) -> list[float]:
        seen.update(prompts=prompts, completions=completions, answer=answer, others=columns)
        return [float(len(text)) for text in completions]

    prompts, responses = readable(tokenizer)
    prompts = Prompts(
        prompt_ids=prompts.prompt_ids,
        prompt_mask=prompts.prompt_mask,
        texts=["a", "b", [{"role": "user", "content": "c"}], "d"],
        columns={"answer": [1, 2, 3, 4], "topic": ["v", "w", "x", "y"]},
    )
    scores = FunctionReward(reward, tokenizer)(prompts, responses)
    texts = [" the film is good", " plot was not very dull and bad", " the", " good good ."]
    assert seen == {
        "prompts": prompts.texts,
        "completions": texts,
        "answer": [1, 2, 3, 4],
        "others": {"topic": ["v", "w", "x", "y"]},
    }
    assert scores.scores.tolist() == [float(len(text)) for text in texts]
    assert isinstance(scores, Scores)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0, 3.0], "stars returned 3 scores for 4 responses"),
        (None, "stars returned None; return a list of a number for each of the completions"),
        ([1.0, math.nan, 0.0, math.nan], r"stars returned nan for response 1 \(2 such of 4\)"),
        ([1.0, 2.0, math.inf, 0.0], "stars returned inf for response 2"),
        ([1.0, None, 0.0, 0.0], "stars returned None for response 1"),
        (["good", 1.0, 0.0, 0.0], "stars returned 'good' for response 0"),
    ],
)
def test_a_function_that_returns_something_else_than_a_number_a_response_is_refused_by_name(
    answer: Any, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    def stars(**_: list) -> Any:
        return answer

    with pytest.raises(ValueError, match=message):
        FunctionReward(stars, tokenizer)(*readable(tokenizer))


def test_a_function_is_refused_where_attention_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    """abc.md section 10 row 17: refused at the start, not accepted without effect."""

    def stars(**_: list) -> list[float]:
        return [0.0] * 4

    with pytest.raises(ValueError, match="needs attention of a reward model; stars is a function"):
        FunctionReward(stars, tokenizer)(*readable(tokenizer), Needs(attention=AttentionRequest()))


def test_decoded_responses_hold_neither_padding_nor_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = decode(tokenizer, *readable(tokenizer))
    assert [text.strip() for text in texts] == [text.removesuffix(" </s>") for text in READABLE]


def test_a_completion_keeps_the_space_that_begins_it(shared: Path) -> None:
    # A sentencepiece decoder drops the first space of what it is given: "film" and " ing" would become "filming".
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "stories260k")
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("a small dog", "a small dog went home"))
    ids = torch.tensor([whole[len(prompt) :]])
    prompts = Prompts(
        prompt_ids=torch.tensor([prompt]),
        prompt_mask=torch.ones(1, len(prompt), dtype=torch.bool),
        texts=["a small dog"],
        columns={},
    )
    responses = Responses(response_ids=ids, response_mask=torch.ones_like(ids, dtype=torch.bool), logprobs=ids.float())
    assert decode(tokenizer, prompts, responses) == [" went home"]


def test_a_function_that_the_columns_do_not_fit_is_refused_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    def wanted_word(completions: list[str], wanted: list[str], **_: object) -> list[float]:
        return [float(word in text) for text, word in zip(completions, wanted, strict=True)]

    with pytest.raises(ValueError, match=r"prompts, completions, other: missing .* 'wanted'; add the column"):
        FunctionReward(wanted_word, tokenizer, ["other"])
    several: Any = [wanted_word]
    with pytest.raises(ValueError, match=r"the reward is \[<function .*one function \(not a list\)"):
        inspect.unwrap(FunctionReward.__init__)(object.__new__(FunctionReward), several, tokenizer)
    FunctionReward(wanted_word, tokenizer, ["wanted", "other"])
