"""What flows through the program refuses what does not fit together, and names it."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from apportion import Scores
from apportion.batch import rows
from batches import mask_of, mask_of_lengths, random_rollout, random_scores, without_type_checks


def test_kl_is_the_log_ratio_on_valid_tokens_and_zero_elsewhere() -> None:
    """ma-rlhf.md section 4 row 18: the logged KL took in prompt and padding, scaled by -kl_coef."""
    rollout = replace(
        random_rollout(mask_of([[1, 1, 0]])),
        old_logprobs=torch.tensor([[-1.0, -2.0, torch.nan]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0, 3.0]]),
    )
    assert rollout.kl.tolist() == [[0.5, -1.0, 0.0]]


def test_lengths_count_valid_response_tokens_only() -> None:
    """ma-rlhf.md section 4 row 19: the logged length counted padding and one prompt token."""
    assert random_rollout(mask_of([[1, 1, 0], [1, 0, 1], [0, 0, 0]])).lengths.tolist() == [2, 2, 0]


def test_kl_is_float32_for_half_precision_inputs() -> None:
    rollout = random_rollout(mask_of_lengths(3))
    half = replace(rollout, old_logprobs=rollout.old_logprobs.bfloat16(), ref_logprobs=rollout.ref_logprobs.bfloat16())
    assert half.kl.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("response_mask", lambda x: x.long(), r"response_mask has dtype torch.int64; convert it with .bool\(\)"),
        ("prompt_mask", lambda x: x.float(), r"prompt_mask has dtype torch.float32; convert it with .bool\(\)"),
        ("prompt_mask", lambda x: x[:, 1:], r"shapes \(2, 4\) and \(2, 3\); give both \(2, P\)"),
        ("values", lambda x: x[:, :-1], r"values has shape \(2, 2\); response_ids has \(2, 3\)"),
        ("old_logprobs", lambda x: x[:1], r"old_logprobs has shape \(1, 3\)"),
        ("ref_logprobs", lambda x: x[..., None], r"ref_logprobs has shape \(2, 3, 1\)"),
        ("response_mask", lambda x: x[:1], r"response_mask has shape \(1, 3\)"),
    ],
)
def test_a_rollout_that_does_not_fit_is_refused(name, change, message) -> None:
    rollout = random_rollout(mask_of_lengths(3, 2))
    with without_type_checks(), pytest.raises(ValueError, match=message):
        replace(rollout, **{name: change(getattr(rollout, name))})


@pytest.mark.parametrize("name", ["attention", "prefix_scores"])
def test_scores_with_other_rows_are_refused(name: str) -> None:
    scores = random_scores(mask_of_lengths(3, 2))
    with without_type_checks(), pytest.raises(ValueError, match=f"{name} has 1 rows; scores has 2"):
        replace(scores, **{name: getattr(scores, name)[:1]})


def test_scores_of_a_column_are_refused() -> None:
    """A reward head returns (B, 1), which would broadcast to (B, B, T) without a word."""
    scores = random_scores(mask_of_lengths(3, 2))
    with without_type_checks(), pytest.raises(ValueError, match=r"scores has shape \(2, 1\); give one number a resp"):
        replace(scores, scores=scores.scores[:, None])


def test_mapping_scores_touches_what_is_in_units_of_the_score() -> None:
    """abc.md section 10 row 15: scaling, norm and clip come before redistribution and work with dense scores."""
    scores = random_scores(mask_of_lengths(3, 2))
    doubled = scores.map(lambda x: 2 * x)
    assert torch.equal(doubled.scores, 2 * scores.scores)
    assert doubled.prefix_scores is not None
    assert scores.prefix_scores is not None
    assert torch.equal(doubled.prefix_scores.nan_to_num(), 2 * scores.prefix_scores.nan_to_num())
    assert doubled.attention is scores.attention
    assert Scores(scores=scores.scores).map(torch.neg).prefix_scores is None


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 0])])
def test_rows_are_taken_from_every_tensor(index) -> None:
    rollout, scores = random_rollout(mask_of_lengths(3, 2, 1)), random_scores(mask_of_lengths(3, 2, 1))
    assert torch.equal(rows(rollout, index).values.nan_to_num(), rollout.values[index].nan_to_num())
    assert torch.equal(rows(scores, index).scores, scores.scores[index])
    assert rows(Scores(scores=scores.scores), index).attention is None


def test_batches_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        random_rollout(mask_of_lengths(3)).values = torch.zeros(1, 3)  # pyright: ignore
