"""A policy that responds to prompts, outside of training."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.batch import Prompts
from apportion.models import Policy
from apportion.pretrained import load_policy
from apportion.rollout import Responses, sample
from apportion.sampling import Sampling
from apportion.train.learner import end_tokens, tokenizer_of


class Sampler:
    """A model with its tokenizer, on the accelerator where there is one.

    Attributes:
        sampling: What responses are drawn from.
        tokenizer: The model's.
        device: Where it computes.
        policy: The model.
        bf16: Whether it computes in bfloat16 where it is safe.
    """

    def __init__(self, model: str, sampling: Sampling, *, bf16: bool = False) -> None:
        self.sampling, self.bf16 = sampling, bf16
        self.tokenizer = tokenizer_of(model)
        # Up to torch 2.6 to ask for an accelerator is an error where there is none.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = found or torch.device("cpu")
        self.policy = self.load(model)

    def load(self, model: str) -> Policy:
        """Load another model of the same tokenizer, such as a reference."""
        placed = self.placed(load_policy(model))
        return Policy(placed, end_tokens(placed, self.tokenizer))

    def placed(self, model: nn.Module) -> nn.Module:
        """Move a model to where this one is."""
        return model.to(self.device)

    def precision(self) -> AbstractContextManager:
        """What models compute in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def __call__(self, prompts: Prompts, uniforms: Float[Tensor, "B T"]) -> Responses:
        """Draw a response to each prompt.

        Args:
            prompts: B prompts.
            uniforms: (B, T) float. For T = max_new_tokens; same numbers, same responses.

        Returns:
            The responses.
        """
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)  # else encode_prompts has refused the tokenizer
        with self.precision():
            return sample(self.policy, prompts, self.sampling, uniforms, pad_id=pad_id)
