"""The policy's attention to its own responses, read in a pass of the policy that the update can learn from.

PPO's first pass over a rollout is made by the policy that sampled. Where the attention is asked for, that pass is made
before credit is assigned, and its log-probabilities are handed to the update, those of the rows read last with their
graph, for the update begins with them. So where all rows are read at once the attention costs what is computed beside
the pass, not another one; otherwise the other rows are read once more, up to the layer that is asked for.

Source: ABC-D, Chan et al., 2024 (https://arxiv.org/abs/2402.00782), which stores the maps of generation.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.batch import AttentionRequest, Rollout
from apportion.microbatches import in_groups
from apportion.models import Policy, hidden_states
from apportion.rollout import trim, widths
from apportion.sampling import Sampling
from apportion.score.attention_columns import capture_attention, queries_of


@dataclass(frozen=True, kw_only=True)
class PolicyReading:
    """What the policy says of a rollout before it learns from it.

    Attributes:
        attention: (B, T) float32. Attention that the policy pays to each response token; 0 outside the response.
        logprobs: (B, T) float32 or None. Log-probabilities of the response tokens as in training, in nats; of the
            rows that were read last alone, with the policy's graph, or of all without.
    """

    attention: Float[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"] | None


def read_policy(
    policy: nn.Module,
    rollout: Rollout,
    request: AttentionRequest,
    *,
    sampling: Sampling,
    budget: int,
    logprobs: Literal["last", "all"] | None,
) -> PolicyReading:
    """Run the policy over its responses, and capture its attention to them.

    The whole response is read, its last token too, which predicts nothing but is a query of the teacher-forced form.

    Args:
        policy: A `Policy`, or what accelerate made of one.
        rollout: The responses.
        request: Layer, heads, and which queries are averaged.
        sampling: The distribution of the log-probabilities.
        budget: Tokens that the model is given at once, padding included.
        logprobs: Whose log-probabilities are computed: of the rows that are read last, with the policy's graph; of all,
            without; None to leave the head out.

    Returns:
        Attention, and log-probabilities if they are asked for.

    Raises:
        ValueError: If the policy has no attention layer or head of that number.
        RuntimeError: If the policy drops out.
    """
    width = rollout.response_ids.shape[1]
    everything = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)

    def read(group: Int[Tensor, " N"]) -> tuple[Tensor, ...]:
        text = trim(*(x[group] for x in everything))
        prompt_mask, response_mask = text[1], text[3]
        answer = torch.cat([torch.zeros_like(prompt_mask), response_mask], 1)
        with_logprobs = logprobs == "all" or torch.is_grad_enabled()
        found = torch.zeros(response_mask.shape, device=response_mask.device)
        with capture_attention(policy, request, answer, alone=not with_logprobs) as captured:
            if with_logprobs:
                found = policy(*text, sampling, whole=True)
            else:
                _run(policy, text)
        seen = response_mask & queries_of(request, answer).any(1, keepdim=True)
        return torch.where(seen, captured.weights[:, prompt_mask.shape[1] :], 0), found

    with torch.no_grad():
        lengths = widths(rollout.prompt_mask, rollout.response_mask)
        attention, found = in_groups(read, lengths, budget, width, graph_of_last=logprobs == "last")
    return PolicyReading(attention=attention, logprobs=None if logprobs is None else found)


def _run(policy: nn.Module, text: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Run the trunk alone."""
    inner = next(module for module in policy.modules() if isinstance(module, Policy))
    hidden_states(inner.model, torch.cat([text[0], text[2]], 1), torch.cat([text[1], text[3]], 1))
