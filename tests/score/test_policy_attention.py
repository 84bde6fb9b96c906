"""What the policy is read for before credit is assigned: attention, and log-probabilities to learn from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from apportion import AttentionRequest, PolicyAttention, Rollout, Sampling
from apportion.batch import rows
from apportion.microbatches import by_length
from apportion.models import Policy, unwrapped
from apportion.rollout import widths
from apportion.score.policy_attention import PolicyReading, read_policy
from families import EOS, causal

SAMPLING = Sampling(max_new_tokens=8, temperature=0.8, top_k=20)
MEAN, LAST = AttentionRequest(row="mean"), AttentionRequest(row="last")
PROMPTS, LENGTHS = (4, 2, 5, 1), (6, 8, 1, 0)


def rollout_of(prompts: tuple[int, ...] = PROMPTS, lengths: tuple[int, ...] = LENGTHS) -> Rollout:
    """Left-padded prompts, right-padded responses."""
    generator = torch.Generator().manual_seed(1)
    prompt_mask = torch.arange(max(prompts)) >= max(prompts) - torch.tensor(prompts)[:, None]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    nothing = torch.zeros(mask.shape)
    return Rollout(
        prompt_ids=torch.randint(3, 48, prompt_mask.shape, generator=generator).masked_fill(~prompt_mask, 0),
        prompt_mask=prompt_mask,
        response_ids=torch.randint(3, 48, mask.shape, generator=generator).masked_fill(~mask, 0),
        response_mask=mask,
        old_logprobs=nothing,
        ref_logprobs=nothing,
        values=nothing,
    )


def read(policy: Policy, rollout: Rollout, request: AttentionRequest, **options: Any) -> PolicyReading:
    return read_policy(
        policy, rollout, request, **{"sampling": SAMPLING, "budget": 10_000, "logprobs": "last"} | options
    )


def eager_map(family: str, rollout: Rollout, b: int, layer: int) -> Tensor:
    """(n, n). Attention of one response's tokens to each other, head mean, of the text alone and without padding."""
    prompt = rollout.prompt_ids[b][rollout.prompt_mask[b]]
    text = torch.cat([prompt, rollout.response_ids[b][rollout.response_mask[b]]])
    model = causal(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=text[None], output_attentions=True).attentions
    return maps[layer][0].float().mean(0)[len(prompt) :, len(prompt) :]


FAMILIES = {"llama": 1, "qwen2": 1, "gpt2": 1, "gpt_neox": 1, "gemma2": 1, "gptj": 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_the_attention_is_that_of_eager_maps_of_each_text_alone(family: str, legacy: bool, mode: Any) -> None:
    rollout = rollout_of()
    request = PolicyAttention(mode=mode, legacy_shift=legacy).needs.policy_attention
    assert request is not None
    found = read(Policy(causal(family), (EOS,)), rollout, request).attention
    for b, length in enumerate(LENGTHS):
        wanted, stop = torch.zeros(8), length - legacy
        maps = eager_map(family, rollout, b, FAMILIES[family]) if length else torch.zeros(0, 0)
        for j in range(stop):
            wanted[j] = maps[j:stop, j].mean() if mode == "mean" else maps[stop - 1, j]
        torch.testing.assert_close(found[b], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_a_response_whose_only_token_is_no_query_has_no_attention(family: str, mode: Any) -> None:
    request = PolicyAttention(mode=mode, legacy_shift=True).needs.policy_attention
    assert request is not None
    for logprobs in ("last", "all", None):
        found = read(Policy(causal(family), (EOS,)), rollout_of((4, 2, 1, 1)), request, logprobs=logprobs).attention
        assert found[2].tolist() == [0.0] * 8
        assert found[0, 0] > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gptj", "bloom"])
@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_a_response_alone_is_read_as_in_any_batch(family: str, budget: int) -> None:
    rollout, policy = rollout_of(), Policy(causal(family), (EOS,))
    for request in (MEAN, LAST):
        together = read(policy, rollout, request, budget=budget, logprobs="all")
        assert together.logprobs is not None
        for b in range(4):
            alone = read(policy, rows(rollout, slice(b, b + 1)), request)
            torch.testing.assert_close(alone.attention[0], together.attention[b], atol=1e-5, rtol=0)
            assert alone.logprobs is not None
            torch.testing.assert_close(alone.logprobs[0], together.logprobs[b], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_next"])
def test_the_log_probabilities_are_those_of_training_with_their_gradient(family: str) -> None:
    rollout = rollout_of()
    gradients = []
    for whole in (False, True):
        policy = Policy(causal(family), (EOS,))
        text = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)
        logprobs = read(policy, rollout, MEAN).logprobs if whole else policy(*text, SAMPLING)
        assert logprobs is not None
        logprobs.square().sum().backward()
        gradients.append([logprobs.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-4)


def test_a_graph_is_kept_and_a_head_is_run_only_when_asked() -> None:
    rollout, policy = rollout_of(), Policy(causal("llama"), (EOS,))
    heads: list[int] = []
    inner: Any = policy.model
    inner.get_output_embeddings().register_forward_hook(lambda *_: heads.append(1))
    with_graph, without = (read(policy, rollout, MEAN, logprobs=whose) for whose in ("last", "all"))
    assert with_graph.logprobs is not None
    assert without.logprobs is not None
    assert with_graph.logprobs.requires_grad
    assert not without.logprobs.requires_grad
    assert torch.equal(with_graph.logprobs, without.logprobs)
    ran = len(heads)
    only = read(policy, rollout, MEAN, logprobs=None)
    assert only.logprobs is None
    assert len(heads) == ran
    for reading in (with_graph, without, only):
        assert not reading.attention.requires_grad
        torch.testing.assert_close(reading.attention, only.attention, atol=1e-6, rtol=0)
        assert (reading.attention[~rollout.response_mask] == 0).all()


def test_of_groups_the_last_alone_runs_the_head_and_keeps_its_graph() -> None:
    rollout, policy = rollout_of(), Policy(causal("llama"), (EOS,))
    *others, last = by_length(widths(rollout.prompt_mask, rollout.response_mask), 20)
    assert others
    part, whole = (read(policy, rollout, MEAN, logprobs=whose, budget=20) for whose in ("last", "all"))
    assert part.logprobs is not None
    assert whole.logprobs is not None
    torch.testing.assert_close(part.attention, whole.attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(part.logprobs[last].detach(), whole.logprobs[last], atol=1e-6, rtol=1e-6)
    assert part.logprobs[last].requires_grad
    assert (part.logprobs[torch.cat(others)] == 0).all()


UP_TO = [("llama", 0), ("llama", 1), ("qwen3_next", 1), ("gptj", 0), ("bloom", 1)]
COMPILED = [("llama", 0), ("llama", 1), ("gptj", 0), ("gptj", 1)]


@pytest.mark.parametrize(
    ("family", "layer", "compiled"), [(*case, False) for case in UP_TO] + [(*case, True) for case in COMPILED]
)
def test_for_its_attention_alone_a_model_is_run_no_further(family: str, layer: int, compiled: bool) -> None:
    rollout, policy = rollout_of(), Policy(causal(family), (EOS,))
    whole = read(policy, rollout, AttentionRequest(row="mean", layer=layer), logprobs="all", budget=20)
    ran: list[str] = []
    for name, module in policy.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    hooks = [len(module._forward_hooks) for module in policy.modules()]
    if compiled:
        unwrapped(policy.model).base_model.compile(backend="eager")
    alone = read(policy, rollout, AttentionRequest(row="mean", layer=layer), logprobs=None, budget=20)
    assert torch.equal(alone.attention, whole.attention)
    assert {name.split(".")[-2] for name in ran} == {str(number) for number in range(layer)}
    assert [len(module._forward_hooks) for module in policy.modules()] == hooks
    ran.clear()  # what was compiled while the model was left early does not leave it afterwards
    again = read(policy, rollout, AttentionRequest(row="mean", layer=layer), logprobs="all", budget=20)
    assert again.logprobs is not None
    torch.testing.assert_close(again.logprobs, whole.logprobs)
    assert len({name.split(".")[-2] for name in ran}) == 2


def test_another_layer_and_other_heads_are_other_attention() -> None:
    rollout, policy = rollout_of(), Policy(causal("llama"), (EOS,))
    readings = [
        read(policy, rollout, AttentionRequest(row="mean", layer=layer, heads=heads)).attention
        for layer, heads in ((None, None), (0, None), (-1, (2,)), (-1, None))
    ]
    assert torch.equal(readings[0], readings[3])
    for other in readings[1:3]:
        assert (other - readings[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"layer 2 is not an attention layer.*choose one of \[0, 1\]"):
        read(policy, rollout, AttentionRequest(layer=2))
