"""Log-probabilities under a large vocabulary; their memory is tested with the policy, in test_models.py."""

import pytest
import torch

from apportion.logprobs import token_logprobs
from apportion.sampling import Sampling, sampled_logits


@pytest.mark.parametrize("sampling", [Sampling(min_new_tokens=2), Sampling(top_k=3, temperature=0.7)])
def test_gradients_of_log_probabilities_are_those_of_log_softmax(sampling: Sampling):
    hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    tokens, places, above = torch.tensor([0, 1, 2, 3, 6]), torch.arange(5), torch.randn(5)
    ours = token_logprobs(hidden, tokens, places, lambda x: x @ head.T, sampling, eos_ids=(4,), vocab_size=7)
    logits = sampled_logits(hidden @ head.T, sampling, places=places, eos_ids=(4,), chosen=tokens)
    plain = logits.log_softmax(-1)[places, tokens]
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours @ above, (hidden, head)), torch.autograd.grad(plain @ above, (hidden, head))
    )


def test_a_second_backward_pass_is_refused_for_the_logits_are_gone() -> None:
    hidden, head = torch.randn(2, 4, requires_grad=True), torch.randn(7, 4)
    nothing = torch.zeros(2, dtype=torch.long)
    ours = token_logprobs(hidden, nothing, nothing, lambda x: x @ head.T, Sampling(), eos_ids=(), vocab_size=7)
    ours.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.sum().backward()
