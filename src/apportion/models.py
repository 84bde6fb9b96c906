"""Policy, critic and reference: Hugging Face models, read at the tokens of a response.

Every model takes a left-padded prompt and a right-padded response, (B, P) and (B, T), and answers for the T response
tokens; the shift by one, from a position to the token that it predicts, happens here and nowhere else.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from apportion.logprobs import token_logprobs
from apportion.sampling import Sampling


def scorer_from_policy(policy: nn.Module) -> PreTrainedModel:
    """Make a critic of a policy in memory: a copy of its trunk under a head that says zero.

    Args:
        policy: A causal language model without adapters.

    Returns:
        A sequence classifier with one label.

    Raises:
        ValueError: If the policy has adapters, or as `refuse_without_classifier`.
    """
    source = unwrapped(policy)
    if source is not policy:
        raise ValueError("a critic cannot be copied from a policy with adapters; give value_model, or a peft_config")
    refuse_without_classifier(source.config)
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=source.dtype)
    model.base_model.load_state_dict(source.base_model.state_dict())
    nn.init.zeros_(score_head(model).weight)
    return model.eval()


def refuse_without_classifier(config: PreTrainedConfig) -> None:
    """Refuse a family of models that can neither score nor be a critic.

    Raises:
        ValueError: If transformers has no sequence classifier of the family.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"transformers has no sequence classifier of the family {config.model_type}, which a critic and a reward "
            "model have to be; give one of another family with the same tokenizer (value_model for the critic), or an "
            "advantage that needs no critic, such as RLOO"
        )


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside of adapters."""
    inner: Any = model
    return inner.get_base_model() if hasattr(model, "get_base_model") else inner


def score_head(model: nn.Module) -> nn.Linear:
    """Find the linear layer that reads a sequence classifier's score.

    Raises:
        ValueError: If the model has none under a name that decoders use.
    """
    base = unwrapped(model)
    for name in ("score", "classifier"):
        head: Any = getattr(base, name, None)
        # PEFT keeps a trained copy of the head beside the original.
        head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
        if isinstance(head, nn.Linear):
            return head
    raise ValueError(f"{type(base).__name__} has no linear layer `score`; give a decoder with a classification head")


def trunk_of(model: nn.Module) -> nn.Module:
    """Find what makes the hidden states of a model: all of it but its head."""
    whole = unwrapped(model)
    trunk = whole.base_model  # the whole, where the family names its trunk otherwise than it says (Llama 4)
    return getattr(whole, "model", whole) if trunk is whole else trunk


def hidden_states(model: nn.Module, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    """Run the trunk of a model over padded sequences.

    Args:
        model: Causal language model or sequence classifier, with adapters or without.
        ids: (B, L) int64.
        mask: (B, L) bool. False on padding, on either side.

    Returns:
        (B, L, D) in the model's dtype. Last hidden states, after the final norm.
    """
    trunk = trunk_of(model)
    return trunk(**inputs(trunk, ids, mask), use_cache=False).last_hidden_state


def inputs(model: nn.Module, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> dict[str, Tensor]:
    """Name the inputs of a forward pass; positions count valid tokens, so that left padding changes nothing."""
    named = {"input_ids": ids, "attention_mask": mask.long()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        named["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return named


class Policy(nn.Module):
    """A causal language model that answers with the log-probabilities of response tokens.

    Attributes:
        model: The Hugging Face model, with adapters or without.
        eos_ids: Tokens that end a response.
    """

    def __init__(self, model: nn.Module, eos_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.eos_ids = eos_ids
        # Together they give logits: all of a model but its head, and the head.
        self._trunk, self._project = _split(unwrapped(model))

    def forward(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        response_ids: Int[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
        sampling: Sampling,
        truncate: bool = True,
    ) -> Float[Tensor, "B T"]:
        """Compute the log-probability of each response token under the distribution that is sampled.

        No (B, T, V) tensor is formed: the head runs over chunks of tokens, which are computed again in the backward
        pass where there are several.

        Args:
            prompt_ids: (B, P) int64. Left-padded.
            prompt_mask: (B, P) bool.
            response_ids: (B, T) int64. Right-padded.
            response_mask: (B, T) bool.
            sampling: The distribution.
            truncate: Whether top-k and top-p apply (see `sampled_logits`).

        Returns:
            (B, T) float32. In nats; 0 outside the mask.
        """
        ids, mask = _before_last(prompt_ids, response_ids), _before_last(prompt_mask, response_mask)
        first, width = prompt_ids.shape[1] - 1, response_ids.shape[1]
        hidden = self._trunk(self.model, ids, mask)[:, first : first + width][response_mask]
        flat = token_logprobs(
            hidden,
            response_ids[response_mask],
            (response_mask.cumsum(1) - 1)[response_mask],
            self._project,
            sampling,
            eos_ids=self.eos_ids,
            vocab_size=unwrapped(self.model).config.get_text_config().vocab_size,
            truncate=truncate,
        )
        return torch.zeros_like(response_mask, dtype=torch.float32).masked_scatter(response_mask, flat)


class Critic(nn.Module):
    """A sequence classifier with one label, read before each response token instead of at the end.

    Attributes:
        model: The Hugging Face model, with adapters or without.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        response_ids: Int[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """Estimate the return before each response token.

        Args:
            prompt_ids: (B, P) int64. Left-padded.
            prompt_mask: (B, P) bool.
            response_ids: (B, T) int64. Right-padded.
            response_mask: (B, T) bool.

        Returns:
            (B, T) float32. 0 outside the mask.
        """
        ids, mask = _before_last(prompt_ids, response_ids), _before_last(prompt_mask, response_mask)
        hidden = hidden_states(self.model, ids, mask)[:, prompt_ids.shape[1] - 1 :]
        values = score_head(self.model)(hidden)[..., 0].float()
        return torch.where(response_mask, values, 0)


def _before_last(prompt: Shaped[Tensor, "B P"], response: Shaped[Tensor, "B T"]) -> Shaped[Tensor, "B L"]:
    """Join prompt and response up to the token before the last, which is the last from which one is predicted."""
    return torch.cat([prompt, response[:, :-1]], 1)


def adapters_off(model: nn.Module) -> AbstractContextManager:
    """Switch low-rank adapters off for a while, which turns the policy into its own reference."""
    inner: Any = model
    return inner.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout to zero, also those of adapters: with dropout the first ratio would not be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # read by attention functions, by fused modules, and as layerdrop
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    return model


def _split(model: PreTrainedModel) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """Split a model into its trunk and what makes logits of the trunk's states, after a trial on two tokens.

    Returns:
        trunk: From (model, ids, mask) to (B, L, D), as `hidden_states`.
        project: From (N, D) to (N, V). For a model that treats its logits in a way that is not known here, `trunk`
            gives its logits and `project` leaves them alone: right, and as large as the model makes them.
    """
    project = _projection(model)
    parameter = next(model.parameters())
    if parameter.device.type == "meta":
        return hidden_states, project
    ids = torch.arange(2, device=parameter.device)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        theirs, ours = _logits(model, ids, mask).float(), project(hidden_states(model, ids, mask)).float()
    if ours.shape == theirs.shape and (ours - theirs).abs().max() <= 0.01 * theirs.abs().max():
        return hidden_states, project
    return _logits, lambda logits: logits


def _logits(model: nn.Module, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
    """Run a whole model over padded sequences."""
    return unwrapped(model)(**inputs(unwrapped(model), ids, mask), use_cache=False).logits


def _projection(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Compose what makes logits of last hidden states: the head, a scale, a soft cap."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0) if isinstance(scale, float | int) else 1.0
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; give a causal language model")
    dtype = next(head.parameters()).dtype

    def project(hidden: Tensor) -> Tensor:
        logits = head(hidden.to(dtype))  # Mamba keeps the stream between its layers in float32
        logits = logits if scale == 1 else logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    return project
