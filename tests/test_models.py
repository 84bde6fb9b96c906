"""Policy and critic answer as the Hugging Face models do, for every family, in chunks, and without dropout."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import apportion.logprobs
from apportion.models import (
    Critic,
    Policy,
    adapters_off,
    hidden_states,
    score_head,
    scorer_from_policy,
    without_dropout,
)
from apportion.sampling import Sampling, sampled_logits
from families import CONFIGS, EOS, NO_CLASSIFIER, VOCABULARY, causal, classifier

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
LENGTHS = ((5, 7), (3, 4), (5, 1), (2, 7))
P, T = 5, 7
LORA = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj", "v_proj"])


def texts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and responses of several lengths, with junk in their padding."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids, response_ids = (
        torch.randint(3, VOCABULARY, (len(LENGTHS), width), generator=generator) for width in (P, T)
    )
    lengths = torch.tensor(LENGTHS)
    prompt_mask = torch.arange(P) >= P - lengths[:, :1]
    return prompt_ids, prompt_mask, response_ids, torch.arange(T) < lengths[:, 1:]


def alone(row: int, batch: tuple[Tensor, ...]) -> Tensor:
    """One text without padding, (1, L)."""
    prompt_ids, prompt_mask, response_ids, response_mask = (x[row] for x in batch)
    return torch.cat([prompt_ids[prompt_mask], response_ids[response_mask]])[None]


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probabilities_equal_those_of_the_model_on_each_text_alone(family: str) -> None:
    """ma-rlhf.md section 4 row 23, over the families."""
    model, batch = causal(family), texts()
    with torch.no_grad():
        found = Policy(model, (EOS,))(*batch, Sampling())
        for row, (prompt, length) in enumerate(LENGTHS):
            ids = alone(row, batch)
            logprobs = model(ids).logits.float().log_softmax(-1)[0, prompt - 1 : -1]
            wanted = logprobs.gather(1, ids[0, prompt:, None])[:, 0]
            torch.testing.assert_close(found[row, :length], wanted, atol=2e-5, rtol=1e-5)
    assert (found[~batch[3]] == 0).all()


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in NO_CLASSIFIER])
def test_values_equal_the_head_before_each_token_of_each_text_alone(family: str) -> None:
    """ma-rlhf.md section 4 row 23: the head was given an argument that some families lack."""
    model, batch = classifier(family), texts()
    with torch.no_grad():
        found = Critic(model)(*batch)
        for row, (prompt, length) in enumerate(LENGTHS):
            hidden = model.base_model(alone(row, batch)).last_hidden_state[0, prompt - 1 : -1]
            torch.testing.assert_close(found[row, :length], score_head(model)(hidden)[:, 0], atol=2e-5, rtol=1e-5)
    assert (found[~batch[3]] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon_h1", "mamba"])
def test_bfloat16_models_give_finite_float32_answers_near_those_of_float32(family: str) -> None:
    """ma-rlhf.md section 4 row 23, in bfloat16."""
    batch = texts()
    with torch.no_grad():
        wide = Policy(causal(family), (EOS,))(*batch, Sampling())
        narrow = Policy(causal(family, torch.bfloat16), (EOS,))(*batch, Sampling())
    assert narrow.dtype == torch.float32
    assert (narrow - wide)[batch[3]].abs().mean() < 0.1


def test_a_family_whose_logits_are_unknown_is_read_whole_and_right() -> None:
    class Strange(type(causal("llama"))):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.sin()
            return output

    model, batch = causal("llama"), texts()
    plain = Policy(model, (EOS,))(*batch, Sampling())
    model.__class__ = Strange
    strange = Policy(model, (EOS,))(*batch, Sampling())
    ids = alone(0, batch)
    wanted = model(ids).logits.log_softmax(-1)[0, P - 1 : -1].gather(1, ids[0, P:, None])[:, 0]
    torch.testing.assert_close(strange[0], wanted, atol=1e-5, rtol=1e-5)
    assert (strange - plain).abs().max() > 0.1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=9, top_p=0.9, min_new_tokens=2)])
def test_log_probabilities_are_those_of_the_sampled_distribution(sampling: Sampling) -> None:
    """ma-rlhf.md section 4 row 12, for the log-probabilities of training."""
    model, batch = causal("llama"), texts()
    with torch.no_grad():
        found = Policy(model, (EOS,))(*batch, sampling)
        ids = alone(0, batch)
        chosen = ids[0, P:]
        logits = sampled_logits(
            model(ids).logits[0, P - 1 : -1], sampling, places=torch.arange(T), eos_ids=(EOS,), chosen=chosen
        )
    torch.testing.assert_close(found[0], logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5, temperature=0.5)])
def test_chunks_change_neither_log_probabilities_nor_gradients(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for tokens in (1, 3, 1000):
        monkeypatch.setattr(apportion.logprobs, "CHUNK_ELEMENTS", tokens * VOCABULARY)
        model = causal("llama").train()
        logprobs = Policy(model, (EOS,))(*texts(), sampling)
        logprobs.square().sum().backward()
        results.append([logprobs.detach(), *(parameter.grad for parameter in model.parameters())])
    for other in results[:-1]:
        torch.testing.assert_close(other, results[-1], atol=2e-4, rtol=1e-3)  # of gradients up to 30


class LargestFloat(TorchDispatchMode):
    """Keep the number of elements of the largest float32 tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.dtype == torch.float32 and x.untyped_storage().size():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_all_logits_is_formed_forward_or_backward(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 2000  # with 32 hidden units the head's gradient, 64,000, is larger than any chunk
    monkeypatch.setattr(apportion.logprobs, "CHUNK_ELEMENTS", 4 * vocabulary)
    policy = Policy(causal("llama", dtype, vocab_size=vocabulary), (EOS,))
    batch = tuple(x.repeat(20, 1) for x in texts())
    with LargestFloat() as largest:
        policy(*batch, Sampling()).sum().backward()
    assert largest.elements <= 32 * vocabulary < int(batch[3].sum()) * vocabulary // 10


@pytest.mark.parametrize("train", [False, True])
def test_two_passes_agree_in_training_mode_also_with_adapters_that_drop_out(train: bool) -> None:
    """abc.md section 10 row 10: rollouts dropped out from step 1 on."""
    model = get_peft_model(causal("llama", attention_dropout=0.5), LORA)
    batch = texts()

    def twice(policy: Policy) -> tuple[Tensor, Tensor]:
        policy.train(train)
        return policy(*batch, Sampling()), policy(*batch, Sampling())

    first, second = twice(Policy(model, (EOS,)))
    assert torch.equal(first, second) is not train
    first, second = twice(Policy(without_dropout(model), (EOS,)))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "layerdrop": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}),
        ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_no_family_drops_out_in_training_mode(family: str, rates: dict[str, Any]) -> None:
    """abc.md section 10 row 10, for other families."""
    policy = Policy(without_dropout(causal(family, **rates)), (EOS,)).train()
    batch = texts()
    assert torch.equal(policy(*batch, Sampling()), policy(*batch, Sampling()))


def test_without_its_adapters_the_policy_is_the_model_it_began_as() -> None:
    batch = texts()
    with torch.no_grad():
        plain = Policy(causal("llama"), (EOS,))(*batch, Sampling())
        model = get_peft_model(causal("llama"), LORA).eval()
        policy = Policy(model, (EOS,))
        changed = policy(*batch, Sampling())
        with adapters_off(model):
            assert torch.equal(policy(*batch, Sampling()), plain)
        assert torch.equal(policy(*batch, Sampling()), changed)
    assert (changed - plain).abs().max() > 0.01


def test_a_critic_made_of_a_policy_has_its_trunk_and_says_zero() -> None:
    policy = causal("llama")
    critic = scorer_from_policy(policy)
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(hidden_states(critic, ids, mask), hidden_states(policy, ids, mask))
    assert (Critic(critic)(*texts()) == 0).all()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1)
    assert not torch.equal(hidden_states(critic, ids, mask), hidden_states(policy, ids, mask))


def test_a_critic_cannot_be_made_of_a_policy_with_adapters() -> None:
    with pytest.raises(ValueError, match="adapters"):
        scorer_from_policy(get_peft_model(causal("llama"), LORA))


@pytest.mark.parametrize("family", NO_CLASSIFIER)
def test_a_critic_of_a_family_without_a_classifier_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=rf"no sequence classifier of the family {CONFIGS[family].model_type}, .*RLOO"):
        scorer_from_policy(causal(family))


def test_a_model_without_a_linear_head_is_refused_by_name(policy: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear layer `score`"):
        score_head(policy)


def test_log_probabilities_of_a_text_without_response_are_nothing() -> None:
    prompt_ids, prompt_mask, response_ids, response_mask = texts()
    logprobs = Policy(causal("llama"), (EOS,))(
        prompt_ids, prompt_mask, response_ids, torch.zeros_like(response_mask), Sampling()
    )
    assert (logprobs == 0).all()


def test_the_log_probabilities_of_a_uniform_model_are_those_of_a_fair_die() -> None:
    model = causal("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    logprobs = Policy(model, (EOS,))(*texts(), Sampling(top_k=0))
    torch.testing.assert_close(logprobs[texts()[3]], torch.full((19,), -math.log(VOCABULARY)))
