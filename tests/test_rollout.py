"""Responses are drawn from the very distribution that is written down, whatever the batch, the family or the cache."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import apportion.rollout
from apportion.batch import Prompts
from apportion.models import Critic, Policy, adapters_off
from apportion.rollout import Responses, complete, sample, trim, widths
from apportion.sampling import Sampling
from families import CONFIGS, EOS, PAD, VOCABULARY, causal, classifier, prompts_of

PROMPTS = ([5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30], [40, 41, 42, 43, 44])
SAMPLINGS = {
    "plain": Sampling(max_new_tokens=20),
    "cold": Sampling(max_new_tokens=20, temperature=0.6),
    "top-k": Sampling(max_new_tokens=20, temperature=0.8, top_k=5),
    "top-p": Sampling(max_new_tokens=20, top_p=0.7),
    "all": Sampling(max_new_tokens=20, min_new_tokens=6, temperature=1.3, top_k=20, top_p=0.9),
}


def uniforms(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def respond(
    model: PreTrainedModel,
    sampling: Sampling,
    prompts: Prompts | None = None,
    *,
    numbers: Tensor | None = None,
    eos_ids: tuple[int, ...] = (EOS,),
    pad_id: int = PAD,
) -> Responses:
    prompts = prompts or prompts_of(*PROMPTS)
    rows = len(prompts.texts)
    numbers = uniforms(rows, sampling.max_new_tokens) if numbers is None else numbers
    return sample(Policy(model, eos_ids), prompts, sampling, numbers, pad_id=pad_id)


def recomputed(model: PreTrainedModel, sampling: Sampling, responses: Responses, prompts: Prompts) -> Tensor:
    with torch.no_grad():
        return Policy(model, (EOS,))(
            prompts.prompt_ids, prompts.prompt_mask, responses.response_ids, responses.response_mask, sampling
        )


def tokens(responses: Responses) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(responses.response_ids, responses.response_mask, strict=True)]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probabilities_of_sampling_equal_recomputed_ones(family: str, sampling: Sampling) -> None:
    """ma-rlhf.md section 4 row 12: drawn at temperature 0.8 and top-k 50, read at temperature 1 over all tokens."""
    prompts, model = prompts_of(*PROMPTS * 4), causal(family)
    responses = respond(model, sampling, prompts)
    wanted = recomputed(model, sampling, responses, prompts)
    torch.testing.assert_close(responses.logprobs, wanted, atol=1e-5, rtol=1e-5)
    assert responses.response_mask.sum(1).unique().numel() > 2


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_samples_what_it_says_and_the_same_alone_as_in_a_batch(family: str) -> None:
    """ma-rlhf.md section 4 row 23: one family ran."""
    prompts, model, sampling = prompts_of(*PROMPTS), causal(family), SAMPLINGS["plain"]
    numbers = uniforms(len(PROMPTS), 20)
    together = respond(model, sampling, prompts, numbers=numbers)
    torch.testing.assert_close(together.logprobs, recomputed(model, sampling, together, prompts), atol=1e-5, rtol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        alone = respond(model, sampling, prompts_of(prompt), numbers=numbers[row : row + 1])
        assert tokens(alone)[0] == tokens(together)[row]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "falcon_h1"])
def test_bfloat16_models_sample_what_they_say(family: str) -> None:
    """ma-rlhf.md section 4 row 23: float16 only."""
    prompts, model, sampling = prompts_of(*PROMPTS), causal(family, torch.bfloat16), SAMPLINGS["plain"]
    responses = respond(model, sampling, prompts)
    gap = (responses.logprobs - recomputed(model, sampling, responses, prompts)).abs()
    assert responses.logprobs.dtype == torch.float32
    assert gap[responses.response_mask].mean() < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_next"])
def test_at_a_temperature_near_zero_responses_are_those_of_greedy_generate(family: str) -> None:
    prompts = prompts_of(*PROMPTS)
    model: Any = causal(family)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=1)
    theirs: Any = model.generate(
        input_ids=prompts.prompt_ids, attention_mask=prompts.prompt_mask.long(), generation_config=greedy
    )
    ours = respond(model, Sampling(max_new_tokens=20, temperature=1e-4))
    width = ours.response_ids.shape[1]
    assert torch.equal(ours.response_ids, theirs[:, prompts.prompt_ids.shape[1] :][:, :width])


def test_the_first_tokens_of_many_responses_follow_the_models_own_probabilities() -> None:
    model, count = causal("llama"), 4000
    responses = respond(model, Sampling(max_new_tokens=1), prompts_of(*[[5, 6, 7]] * count))
    found = responses.response_ids[:, 0].bincount(minlength=VOCABULARY) / count
    wanted = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1).detach()
    assert (found - wanted).abs().max() < 4 * (0.25 / count) ** 0.5


def test_padding_on_the_left_changes_nothing() -> None:
    prompts, model = prompts_of(*PROMPTS), causal("llama")
    junk = torch.full((len(PROMPTS), 9), 33)
    wider = Prompts(
        prompt_ids=torch.cat([junk, prompts.prompt_ids.masked_fill(~prompts.prompt_mask, 33)], 1),
        prompt_mask=torch.cat([torch.zeros_like(junk, dtype=torch.bool), prompts.prompt_mask], 1),
        texts=prompts.texts,
        columns={},
    )
    plain, padded = (respond(model, SAMPLINGS["all"], batch) for batch in (prompts, wider))
    assert torch.equal(plain.response_ids, padded.response_ids)
    torch.testing.assert_close(plain.logprobs, padded.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "falcon_h1", "qwen3_next", "mamba"])
def test_rows_that_leave_the_batch_early_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = causal(family), prompts_of(*PROMPTS * 3)
    sampling = Sampling(max_new_tokens=24)
    results = []
    for every in (1, 3, 1000):
        monkeypatch.setattr(apportion.rollout, "_LOOK_EVERY", every)
        results.append(respond(model, sampling, prompts))
    assert results[0].response_mask.sum(1).min() < 12 < results[0].response_mask.sum(1).max()
    for other in results[1:]:
        assert torch.equal(other.response_ids, results[0].response_ids)
        torch.testing.assert_close(other.logprobs, results[0].logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_cache_samples_the_same(family: str) -> None:
    model = causal(family)
    cached = respond(model, SAMPLINGS["all"])

    class Uncached(type(model)):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )

    policy = Policy(model, (EOS,))
    model.__class__ = Uncached
    found = sample(policy, prompts_of(*PROMPTS), SAMPLINGS["all"], uniforms(len(PROMPTS), 20), pad_id=PAD)
    assert torch.equal(found.response_ids, cached.response_ids)
    torch.testing.assert_close(found.logprobs, cached.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_the_end_is_a_token_of_the_response_also_where_it_pads(pad_id: int) -> None:
    responses = respond(causal("llama"), Sampling(max_new_tokens=30), prompts_of(*PROMPTS * 5), pad_id=pad_id)
    lengths = responses.response_mask.sum(1)
    ended = lengths < responses.response_mask.shape[1]
    assert ended.sum() > 3
    for ids, length in zip(responses.response_ids[ended], lengths[ended], strict=True):
        assert ids[length - 1] == EOS
        assert EOS not in ids[: length - 1]
        assert (ids[length:] == pad_id).all()
    assert (responses.logprobs[~responses.response_mask] == 0).all()


def test_any_of_several_end_tokens_ends_a_response() -> None:
    ends = (EOS, 7, 9, 11)
    found = tokens(respond(causal("llama"), Sampling(max_new_tokens=30), prompts_of(*PROMPTS * 5), eos_ids=ends))
    assert {row[-1] for row in found if len(row) < 30} == set(ends)
    assert not any(token in ends for row in found for token in row[:-1])


def test_without_end_tokens_every_response_is_as_long_as_allowed() -> None:
    responses = respond(causal("llama"), Sampling(max_new_tokens=9, min_new_tokens=3), eos_ids=())
    assert responses.response_mask.shape == (4, 9)
    assert responses.response_mask.all()


def test_no_response_ends_before_the_minimum_length() -> None:
    lengths = respond(causal("llama"), Sampling(max_new_tokens=30, min_new_tokens=8), prompts_of(*PROMPTS * 5))
    assert lengths.response_mask.sum(1).min() >= 8


def test_an_early_end_returns_no_token_of_the_prompt() -> None:
    # abc.md section 10, row 5: a slice from the end gave prompt tokens where a response was short.
    model = causal("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 100 * model.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    found = tokens(respond(model, Sampling(max_new_tokens=20), prompts_of([5, 6])))
    assert found == [[EOS]]


def test_the_response_is_only_as_wide_as_its_longest_row() -> None:
    responses = respond(causal("llama"), Sampling(max_new_tokens=64), prompts_of(*PROMPTS))
    assert responses.response_mask.shape[1] == responses.response_mask.sum(1).max() < 64


def test_the_same_numbers_give_the_same_responses_and_others_give_others() -> None:
    model, sampling = causal("llama"), SAMPLINGS["plain"]
    first, again, other = (respond(model, sampling, numbers=uniforms(4, 20, seed)) for seed in (0, 0, 1))
    assert tokens(first) == tokens(again) != tokens(other)


def test_numbers_of_another_shape_and_empty_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uniforms has shape \(4, 3\); give \(4, 20\)"):
        respond(causal("llama"), SAMPLINGS["plain"], numbers=uniforms(4, 3))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        respond(causal("llama"), SAMPLINGS["plain"], prompts_of([5, 6], []))


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_a_rollout_holds_what_reference_and_critic_say_whatever_the_budget(budget: int) -> None:
    prompts, sampling = prompts_of(*PROMPTS), SAMPLINGS["top-k"]
    responses = respond(causal("llama"), sampling, prompts)
    reference, critic = Policy(causal("gpt2"), (EOS,)), Critic(classifier("llama"))
    rollout = complete(prompts, responses, reference=reference, critic=critic, sampling=sampling, budget=budget)
    texts = (prompts.prompt_ids, prompts.prompt_mask, responses.response_ids, responses.response_mask)
    with torch.no_grad():
        whole = Sampling(max_new_tokens=20, temperature=0.8)  # top-k does not apply to the reference
        torch.testing.assert_close(rollout.ref_logprobs, reference(*texts, whole), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rollout.values, critic(*texts), atol=1e-5, rtol=1e-5)
    assert torch.equal(rollout.old_logprobs, responses.logprobs)


def test_the_divergence_from_oneself_is_zero_and_from_a_reference_is_positive_under_every_sampling() -> None:
    # abc.md section 10, row 6: a minimum length that only the sampler knew made the estimate negative and exploitable.
    prompts = prompts_of(*PROMPTS * 50)
    for name, sampling in SAMPLINGS.items():
        responses = respond(causal("llama"), sampling, prompts)
        for other, expected in ((causal("llama"), name in ("plain", "cold")), (causal("qwen2"), False)):
            rollout = complete(
                prompts, responses, reference=Policy(other, (EOS,)), critic=None, sampling=sampling, budget=8192
            )
            divergence = rollout.kl.sum(1)
            if expected:
                assert divergence.abs().max() < 1e-3
            else:
                assert divergence.mean() > -3 * divergence.std() / len(divergence) ** 0.5


@pytest.mark.parametrize("name", ["top-k", "top-p", "all"])
def test_the_divergence_from_oneself_under_a_cut_is_minus_the_log_of_the_probability_kept(name: str) -> None:
    prompts, model, sampling = prompts_of(*PROMPTS * 4), causal("llama"), SAMPLINGS[name]
    responses = respond(model, sampling, prompts)
    rollout = complete(prompts, responses, reference=Policy(model, (EOS,)), critic=None, sampling=sampling, budget=8192)
    ids = torch.cat([prompts.prompt_ids, responses.response_ids], 1)
    attention = torch.cat([prompts.prompt_mask, responses.response_mask], 1).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    logits = logits[:, prompts.prompt_ids.shape[1] - 1 : -1] / sampling.temperature
    logits[:, : sampling.min_new_tokens, EOS] = -torch.inf
    kept = logits.softmax(-1).sort(descending=True).values
    among = torch.arange(kept.shape[-1]) < (sampling.top_k or kept.shape[-1])
    renormalized = kept * among / (kept * among).sum(-1, keepdim=True)
    nucleus = renormalized.cumsum(-1) - renormalized < sampling.top_p
    mass = (kept * (among & nucleus)).sum(-1)
    wanted = torch.where(responses.response_mask, -mass.log(), 0)
    torch.testing.assert_close(rollout.kl, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.sum(1).min() > 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_adapters_sample_and_their_base_is_the_reference() -> None:
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model, prompts, sampling = get_peft_model(causal("llama"), config).eval(), prompts_of(*PROMPTS), SAMPLINGS["plain"]
    policy = Policy(model, (EOS,))
    responses = sample(policy, prompts, sampling, uniforms(4, 20), pad_id=PAD)

    @contextmanager
    def as_reference() -> Any:
        with adapters_off(model):
            yield

    rollout = complete(
        prompts, responses, reference=policy, critic=None, sampling=sampling, budget=99, as_reference=as_reference
    )
    base = complete(
        prompts, responses, reference=Policy(causal("llama"), (EOS,)), critic=None, sampling=sampling, budget=99
    )
    torch.testing.assert_close(rollout.ref_logprobs, base.ref_logprobs, atol=1e-5, rtol=1e-5)
    assert rollout.kl.abs().max() > 0.01


def test_trimming_cuts_only_columns_that_are_padding_in_every_row() -> None:
    prompt_ids, response_ids = torch.arange(12).view(2, 6), torch.arange(10).view(2, 5)
    prompt_mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    response_mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    found = trim(prompt_ids, prompt_mask, response_ids, response_mask)
    assert torch.equal(found[0], prompt_ids[:, 2:])
    assert torch.equal(found[1], prompt_mask[:, 2:])
    assert torch.equal(found[2], response_ids[:, :3])
    assert torch.equal(found[3], response_mask[:, :3])
    assert widths(prompt_mask, response_mask).tolist() == [[2, 2], [4, 3]]


def test_trimming_keeps_holes_and_a_column_of_what_is_empty() -> None:
    holes = torch.tensor([[1, 0, 1, 0]]).bool()
    ids = torch.arange(4)[None]
    assert torch.equal(trim(ids, torch.ones_like(holes), ids, holes)[3], holes[:, :3])
    assert trim(ids, torch.ones_like(holes), ids, torch.zeros_like(holes))[2].shape == (1, 1)
