"""The score of each response, and what a redistribution asks the reward model for besides."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from apportion.batch import NOTHING, AttentionRequest, Needs, Prompts, Scores
from apportion.checks import call_error
from apportion.microbatches import in_groups
from apportion.models import hidden_states, score_head, unwrapped
from apportion.rollout import Responses, trim, widths
from apportion.score.alignment import Template, align, concatenation, usable_pad
from apportion.score.attention import check_request
from apportion.score.attention_columns import capture_attention


@runtime_checkable
class Reward(Protocol):
    """Anything that scores responses."""

    def __call__(self, prompts: Prompts, responses: Responses, needs: Needs = NOTHING) -> Scores:
        """Score B responses; `needs` says what is wanted besides."""
        ...


class RewardModel:
    """A sequence classifier with one label, run under its own fast attention kernel, without gradient.

    Where the reward model has the policy's vocabulary it reads the sampled tokens themselves. Where it has another
    tokenizer, or a template, it reads text, and what it says of its own tokens is carried over by character spans
    (`score.alignment`).

    Attributes:
        model: The classifier.
        tokenizer: Its tokenizer.
        policy_tokenizer: That of the responses.
        budget: Tokens that the model is given at once, padding included.
        template: From prompt and response to the text that the model reads; None for one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        budget: int = 16_384,
        template: Template | None = None,
    ) -> None:
        head = score_head(model)
        if head.out_features != 1:
            raise ValueError(f"the reward model has {head.out_features} labels; give a sequence classifier with one")
        self.model, self.tokenizer, self.policy_tokenizer = model.eval(), tokenizer, policy_tokenizer
        if template is not None:
            _check_template(template)
        self.budget, self.template = budget, template
        self.same_tokens = template is None and same_vocabulary(tokenizer, policy_tokenizer)
        if not self.same_tokens:
            usable_pad(tokenizer)

    def __call__(self, prompts: Prompts, responses: Responses, needs: Needs = NOTHING) -> Scores:
        """Score B responses."""
        read = self._read_tokens if self.same_tokens else self._read_text
        scores, attention, prefix_scores = read(prompts, responses, needs)
        return Scores(
            scores=checked(scores, "the reward model"),
            attention=attention if needs.attention else None,
            prefix_scores=prefix_scores if needs.prefix_scores else None,
        )

    def check(self, needs: Needs) -> None:
        """Refuse what the model cannot supply, before it runs.

        Raises:
            ValueError: If it has no attention layer, or head, of a number, with those that it has; or lines of errors
                are wanted.
        """
        if needs.error_tokens:
            raise ValueError(
                "the redistribution needs the lines of errors, which a reward model does not report; give "
                "a reward that does, such as ProgramTests"
            )
        if needs.attention is not None:
            check_request(self.model, needs.attention)

    def read(
        self, ids: Int[Tensor, "B L"], mask: Tensor, request: AttentionRequest | None, answer: Bool[Tensor, "B L"]
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Run the model over padded sequences.

        Args:
            ids: (B, L) int64. Padded on either side.
            mask: (B, L) bool. False on padding.
            request: Which attention is computed; None for none.
            answer: (B, L) bool. True on the response.

        Returns:
            scores: (B) float32. The head at the position that it reads.
            attention: (B, L) float32. As the request says; zeros when nobody asked, and where no query is.
            position_scores: (B, L) float32. The head at every position.
        """
        index = self.read_index(ids, mask)
        with torch.no_grad():
            if request is None:
                hidden, attention = hidden_states(self.model, ids, mask), torch.zeros(ids.shape, device=ids.device)
            else:
                columns = torch.arange(ids.shape[1], device=ids.device)
                until = columns == index[:, None] if request.row == "read" else answer & (columns <= index[:, None])
                with capture_attention(self.model, request, until) as captured:
                    hidden = hidden_states(self.model, ids, mask)
                attention = torch.where(until.any(1, keepdim=True), captured.weights, 0)
            everywhere = score_head(self.model)(hidden)[..., 0].float()
        return everywhere.gather(1, index[:, None])[:, 0], attention, everywhere

    def read_index(self, ids: Int[Tensor, "B L"], mask: Tensor) -> Int[Tensor, " B"]:
        """Find where the head reads its score: at the rightmost token that is not the padding token.

        This is transformers' own rule, so that scores equal those of training; where the padding token also ends
        texts, the score is read just before the end.

        Args:
            ids: (B, L) int64.
            mask: (B, L) bool.

        Returns:
            (B) int64. Column.
        """
        columns = torch.arange(ids.shape[1], device=ids.device)
        pad = unwrapped(self.model).config.get_text_config().pad_token_id
        return torch.where(mask & (ids != (-1 if pad is None else pad)), columns, 0).amax(1)

    def _read_tokens(self, prompts: Prompts, responses: Responses, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
        """Read the sampled tokens as they are."""
        width = responses.response_ids.shape[1]
        everything = (prompts.prompt_ids, prompts.prompt_mask, responses.response_ids, responses.response_mask)

        def read(group: Int[Tensor, " N"]) -> tuple[Tensor, ...]:
            prompt_ids, prompt_mask, response_ids, response_mask = trim(*(x[group] for x in everything))
            ids, mask = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1)
            first = prompt_ids.shape[1]
            answer = torch.cat([torch.zeros_like(prompt_mask), response_mask], 1)
            scores, attention, everywhere = self.read(ids, mask, needs.attention, answer)
            return scores, torch.where(response_mask, attention[:, first:], 0), everywhere[:, first - 1 :]

        lengths = widths(prompts.prompt_mask, responses.response_mask)
        scores, attention, prefix = in_groups(read, lengths, self.budget, width + 1)
        return scores, attention[:, :width], prefix

    def _read_text(self, prompts: Prompts, responses: Responses, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
        """Read the text in the reward model's own tokens, and carry its answers over to the policy's."""
        texts = align(
            policy_tokenizer=self.policy_tokenizer,
            reward_tokenizer=self.tokenizer,
            prompt_ids=prompts.prompt_ids,
            prompt_mask=prompts.prompt_mask,
            response_ids=responses.response_ids,
            response_mask=responses.response_mask,
            template=self.template or concatenation,
            prompts=prompts.texts if self.template else None,
        )

        answer = texts.answer

        def read(group: Int[Tensor, " N"]) -> tuple[Tensor, ...]:
            width = int(texts.attention_mask[group].sum(1).max())
            ids, mask = texts.input_ids[group, :width], texts.attention_mask[group, :width]
            return self.read(ids, mask, needs.attention, answer[group, :width])

        lengths = texts.attention_mask.sum(1)
        scores, attention, everywhere = in_groups(read, lengths, self.budget, texts.input_ids.shape[1])
        return scores, texts.to_policy(attention), texts.prefix_scores(everywhere)


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Tell whether two tokenizers give the same ids to the same tokens."""
    return one is other or one.get_vocab() == other.get_vocab()


def decode(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, responses: Responses) -> list[str]:
    """Decode responses in the context of their prompts, without special tokens.

    On its own a response may lose its first space, and with it the word that it begins: prompt and completion are one
    text.

    Args:
        tokenizer: The policy's.
        prompts: B prompts.
        responses: Their responses.

    Returns:
        B completions; the decoded prompt with its completion behind it is the decoded whole.
    """
    prompt_rows = zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
    heads = [ids[mask].tolist() for ids, mask in prompt_rows]
    rows = zip(responses.response_ids.tolist(), responses.response_mask.sum(1).tolist(), strict=True)
    tails = [ids[:length] for ids, length in rows]
    return [_decoded_after(tokenizer, head, tail) for head, tail in zip(heads, tails, strict=True)]


def _decoded_after(tokenizer: PreTrainedTokenizerBase, head: list[int], tail: list[int]) -> str:
    """Decode what comes after a prompt; on its own where the prompt's last character goes on in it."""
    before, whole = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (head, head + tail))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(tail, skip_special_tokens=True))


def checked(scores: Float[Tensor, " B"], source: str) -> Float[Tensor, " B"]:
    """Refuse scores that are not finite, which would poison every parameter.

    Raises:
        ValueError: If a score is NaN or infinite; it names the first.
    """
    bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        value = float(scores[bad[0]])
        raise ValueError(f"{source} returned {value} for response {bad[0]} ({len(bad)} such of {len(scores)}); mend it")
    return scores


def _check_template(template: Template) -> None:
    """Refuse a template that cannot be called with a prompt and a response."""
    if error := call_error(template, "", ""):
        raise ValueError(f"reward_template {name_of(template)} is called with prompt and response: {error}") from error


def name_of(function: Any) -> str:
    """Name a callable as its author does."""
    return getattr(function, "__name__", type(function).__name__)
