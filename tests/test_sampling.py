"""The sampled distribution is that of transformers' own logits processors, and draws follow it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from apportion.sampling import Sampling, draw, sampled_logits

EOS = (2, 5)


def logits_of(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def theirs(logits: Tensor, sampling: Sampling, place: int) -> Tensor:
    """What `generate` makes of logits after `place` new tokens."""
    ids = torch.zeros(len(logits), 7 + place, dtype=torch.long)
    processors: list[Any] = [MinNewTokensLengthLogitsProcessor(7, sampling.min_new_tokens, list(EOS))]
    processors += [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
    processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    processors += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for processor in processors:
        logits = processor(ids, logits)
    return logits


@given(
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 4, 12, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_new_tokens=st.sampled_from([0, 3]),
    place=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_logits_equal_those_of_the_processors_of_generate(
    temperature: float, top_k: int, top_p: float, min_new_tokens: int, place: int, seed: int
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens)
    logits = logits_of(4, 12, seed)
    ours = sampled_logits(logits, sampling, places=torch.full((4,), place), eos_ids=EOS)
    torch.testing.assert_close(ours, theirs(logits, sampling, place))


def test_each_row_is_held_to_the_minimum_length_by_its_own_place() -> None:
    ours = sampled_logits(
        logits_of(3, 8), Sampling(min_new_tokens=2), places=torch.tensor([0, 1, 2]), eos_ids=EOS
    ).isinf()
    assert ours[:, list(EOS)].tolist() == [[True, True], [True, True], [False, False]]
    assert int(ours.sum()) == 4


def test_settings_that_cut_nothing_leave_the_logits_to_the_bit() -> None:
    logits = logits_of(3, 8)
    assert torch.equal(sampled_logits(logits, Sampling(), places=torch.zeros(3, dtype=torch.long), eos_ids=EOS), logits)


def test_a_drawn_token_stays_possible_after_the_policy_moved_and_nothing_else_changes() -> None:
    logits, sampling = logits_of(1, 12), Sampling(top_k=3)
    last = logits.argmin(1)
    places = torch.zeros(1, dtype=torch.long)
    without = sampled_logits(logits, sampling, places=places, eos_ids=EOS)
    within = sampled_logits(logits, sampling, places=places, eos_ids=EOS, chosen=last)
    assert without[0, last].item() == -math.inf
    assert within[0, last].item() == logits[0, last].item()
    others = torch.arange(12) != last
    assert torch.equal(without[0, others], within[0, others])


def test_the_reference_keeps_all_tokens_but_the_temperature_and_the_minimum_length() -> None:
    sampling = Sampling(top_k=2, top_p=0.5, temperature=2.0, min_new_tokens=1)
    logits = logits_of(2, 8)
    ours = sampled_logits(logits, sampling, places=torch.zeros(2, dtype=torch.long), eos_ids=EOS, truncate=False)
    possible = torch.tensor([token not in EOS for token in range(8)])
    torch.testing.assert_close(ours[:, possible], logits[:, possible] / 2)
    assert ours[:, ~possible].isinf().all()


def test_draws_follow_the_distribution() -> None:
    # A false alarm once in 10,000 seeds, and the seed is fixed.
    logits = sampled_logits(logits_of(1, 30), Sampling(top_k=20), places=torch.zeros(1, dtype=torch.long), eos_ids=EOS)
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(logits.expand(len(uniforms), -1), uniforms)
    possible = logits[0].isfinite()
    found = tokens.bincount(minlength=30)
    assert found[~possible].sum() == 0
    wanted = logits[0].double().softmax(-1)[possible] * len(uniforms)
    assert chisquare(found[possible].double(), wanted).pvalue > 1e-4


@pytest.mark.parametrize("vocabulary", [2, 50, 32_000])
def test_no_impossible_token_is_drawn_however_extreme_the_number(vocabulary: int) -> None:
    numbers = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-22, 1 - 2**-24, 1.0])
    for impossible in ("first", "last", "all but one", "every other"):
        logits = logits_of(1, vocabulary).expand(len(numbers), -1).clone()
        banned = torch.zeros(vocabulary, dtype=torch.bool)
        banned[
            {"first": slice(0, 1), "last": slice(-1, None), "all but one": slice(1, None)}.get(
                impossible, slice(0, None, 2)
            )
        ] = True
        tokens, logprobs = draw(logits.masked_fill(banned, -math.inf), numbers)
        assert not banned[tokens].any(), impossible
        assert logprobs.isfinite().all()


def test_the_log_probability_of_a_draw_is_that_of_the_distribution() -> None:
    logits = logits_of(64, 30)
    tokens, logprobs = draw(logits, torch.rand(64, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it() -> None:
    logits, uniforms = logits_of(16, 30), torch.rand(16, generator=torch.Generator().manual_seed(2))
    together, _ = draw(logits, uniforms)
    for row in range(16):
        assert draw(logits[row : row + 1], uniforms[row : row + 1])[0].item() == together[row].item()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(logits[order], uniforms[order])[0], together[order])


def test_logits_that_are_not_numbers_give_a_token_and_no_index_error() -> None:
    tokens, logprobs = draw(torch.full((1, 5), math.nan), torch.tensor([0.5]))
    assert 0 <= int(tokens) < 5
    assert logprobs.isnan().all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("temperature", math.inf),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_and_value(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        Sampling(**{setting: value})
