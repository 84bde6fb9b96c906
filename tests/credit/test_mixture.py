"""Mixtures pay the weighted mean of their parts; callables of users stand in the place of a redistribution."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion import (
    Attention,
    AttentionRequest,
    CreditConfig,
    FixedNgram,
    Mixture,
    Needs,
    PolicyAttention,
    PrefixDifference,
    Rollout,
    Scores,
    Shuffled,
    Terminal,
    Uniform,
    Weighted,
    assign_credit,
)
from apportion.batch import rows
from apportion.credit.redistribution import place
from apportion.credit.token_weights import token_weights
from apportion.parsing.parsers import Stanza
from apportion.parsing.reviews import trees
from batches import mask_of_lengths, random_rollout, random_scores, without_type_checks

masks = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(lambda lengths: mask_of_lengths(*lengths, width=9))


def first_token(rollout: Rollout, scores: Scores, **_: Any) -> Tensor:
    """A user's own: the whole score on the first token, and junk on the padding."""
    first = rollout.response_mask & (rollout.response_mask.cumsum(1) == 1)
    paid = torch.where(first, scores.scores[:, None].double(), 0)
    return paid.masked_fill(~rollout.response_mask, 99.0)


class Asking:
    """A user's own class, which needs attention."""

    needs = Needs(attention=AttentionRequest(layer=1))

    def __call__(self, _: Rollout, scores: Scores, **__: Any) -> Tensor:
        assert scores.attention is not None
        return torch.nan_to_num(scores.attention)


PARTS = st.sampled_from([Terminal(), Uniform(), Attention(), PolicyAttention(beta=1.0), first_token])


@given(mask=masks, seed=st.integers(0, 99), parts=st.lists(st.tuples(PARTS, st.integers(1, 9)), min_size=1, max_size=4))
def test_a_mixture_of_any_weights_keeps_every_sum(mask: Tensor, seed: int, parts: list) -> None:
    total = sum(weight for _, weight in parts)
    mixture = Mixture(tuple(Weighted(redistribution=part, weight=weight / total) for part, weight in parts))
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    placed = mixture(rollout, scores)
    torch.testing.assert_close(placed.sum(1), torch.where(mask.any(1), scores.scores, 0), atol=1e-5, rtol=0)
    assert (placed[~mask] == 0).all()
    for b in range(len(mask)):
        torch.testing.assert_close(mixture(rows(rollout, slice(b, b + 1)), rows(scores, slice(b, b + 1)))[0], placed[b])


def test_a_mixture_by_hand() -> None:
    """R = 10, n = 2: a quarter at the end (0, 2.5), half evenly (2.5, 2.5), a quarter by attention 4 to 1 (2, 0.5)."""
    mixture = Mixture.of({Terminal(): 0.25, Uniform(): 0.5, Attention(beta=1.0): 0.25})
    scores = Scores(scores=torch.tensor([10.0]), attention=torch.tensor([[4.0, 1.0]]))
    assert mixture(random_rollout(mask_of_lengths(2)), scores).tolist() == [[4.5, 5.5]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_mixture_of_one_and_mixtures_of_mixtures_are_what_they_hold(gamma: float) -> None:
    mask = mask_of_lengths(6, 3, 0)
    rollout, scores = random_rollout(mask), random_scores(mask)
    for part in Terminal(), Attention(), PrefixDifference(beta=0.5):
        alone, nested = Mixture.of({part: 1.0}), Mixture.of({Mixture.of({part: 1.0}): 0.4, part: 0.6})
        wanted = part(rollout, scores, gamma=gamma)
        torch.testing.assert_close(alone(rollout, scores, gamma=gamma), wanted)
        torch.testing.assert_close(nested(rollout, scores, gamma=gamma), wanted)


def test_attention_mixes_with_the_end_as_its_beta_does() -> None:
    mask = mask_of_lengths(6, 3, 0)
    rollout, scores = random_rollout(mask), random_scores(mask)
    mixture = Mixture.of({Attention(beta=1.0): 0.8, Terminal(): 0.2})
    torch.testing.assert_close(mixture(rollout, scores, gamma=0.9), Attention(beta=0.8)(rollout, scores, gamma=0.9))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_shuffled_mixture_permutes_what_its_parts_spread_and_leaves_the_rest_at_the_end(gamma: float) -> None:
    mask = mask_of_lengths(7, 4, 1, 0)
    rollout, scores = random_rollout(mask), random_scores(mask)
    whole, half = Attention(beta=1.0), Attention(beta=0.5)
    for mixture in ({half: 1.0}, {whole: 0.5, Terminal(): 0.5}, {half: 0.5, whole: 0.25, Terminal(): 0.25}):
        shuffled = Shuffled(Mixture.of(mixture), seed=4)(rollout, scores, gamma=gamma)
        torch.testing.assert_close(shuffled, Shuffled(half, seed=4)(rollout, scores, gamma=gamma))
        assert not torch.equal(shuffled, half(rollout, scores, gamma=gamma))
    nothing = Shuffled(Mixture.of({Terminal(): 0.6, Attention(beta=0.0): 0.4}))(rollout, scores, gamma=gamma)
    torch.testing.assert_close(nothing, Terminal()(rollout, scores), atol=0, rtol=1e-6)


def test_a_row_whose_shares_all_lie_on_its_last_token_is_left_alone() -> None:
    mask = mask_of_lengths(6, 6, 6)
    rollout = random_rollout(mask)
    attention = torch.tensor([[0.0] * 6, [0, 0, 0, 0, 0, 2.0], [0, 2.0, 0, 0, 0, 0]])
    scores = replace(random_scores(mask), attention=attention, scores=torch.ones(3))
    found = torch.stack([Shuffled(Attention(beta=0.8), seed=seed)(rollout, scores) for seed in range(20)])
    torch.testing.assert_close(found[:, :2], Terminal()(rollout, scores)[:2].expand(20, -1, -1))
    assert len({int(place) for place in (found[:, 2] == 0.8).int().argmax(1)}) > 3
    weights = token_weights(Shuffled(Attention(beta=0.8)), rollout, scores, torch.arange(6).expand(3, -1))
    torch.testing.assert_close(weights[:2], torch.ones(2, 6))


def test_a_mixture_says_what_it_spreads_apart_from_what_it_leaves_at_the_end() -> None:
    mask = mask_of_lengths(7, 4, 1, 0)
    rollout, scores = random_rollout(mask), random_scores(mask)

    def evenly(rollout: Rollout, scores: Scores, **_: Any) -> Tensor:
        return Uniform()(rollout, scores)

    mixture = Mixture.of({Attention(beta=0.5): 0.5, Uniform(): 0.25, evenly: 0.125, Terminal(): 0.125})
    assert mixture.weight == 0.625
    left = (1 - mixture.weight) * Terminal()(rollout, scores)
    torch.testing.assert_close(mixture.weight * mixture.shares(rollout, scores) + left, mixture(rollout, scores))


def test_a_mixture_needs_what_its_parts_need() -> None:
    mixture = Mixture.of({Attention(): 0.2, Attention(beta=0.1): 0.2, PolicyAttention(): 0.3, PrefixDifference(): 0.3})
    assert mixture.needs.names == ("attention", "policy_attention", "prefix_scores")
    assert Mixture.of({Terminal(): 1.0}).needs == Needs()
    assert Mixture.of({Asking(): 1.0}).needs.attention == AttentionRequest(layer=1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({Terminal(): 0.5, Uniform(): 0.6}, r"weights of parts are 0.5, 0.6 and sum to 1.1; make them sum to 1"),
        ({Terminal(): 1.5, Uniform(): -0.5}, r"weight is -0.5; choose a number of at least 0"),
        ({Terminal(): torch.nan}, r"weight is nan"),
        ({Terminal(): "1"}, r"weight is '1'; choose a number"),
        ({Terminal(): True}, r"weight is True; choose a number"),
        (5, r"parts is 5; give redistributions with weights"),
        ("Attention", r"parts is 'Attention'; give redistributions with weights"),
        ({}, r"parts is empty"),
        ({Attention(): 0.5, Attention(layer=0): 0.5}, r"attention is asked for as .*layer=None.* and as .*layer=0"),
        ({PolicyAttention(): 0.5, PolicyAttention(mode="last"): 0.5}, r"policy_attention is asked for as"),
    ],
)
def test_what_is_no_mixture_is_refused(weights: Any, message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        Mixture(weights)


def test_parts_without_a_name_for_their_weight_are_refused() -> None:
    pairs: Any = [(Terminal(), 1.0)]
    with without_type_checks(), pytest.raises(ValueError, match=r"parts holds \(Terminal\(\), 1.0\); give Weighted\("):
        Mixture(pairs)


def test_a_seed_that_is_no_whole_number_is_refused() -> None:
    seed: Any = 0.5
    with without_type_checks(), pytest.raises(ValueError, match=r"seed is 0\.5; give a whole number"):
        Shuffled(Uniform(), seed=seed)


@pytest.mark.parametrize("redistribution", [first_token, Mixture.of({first_token: 1.0})])
def test_a_callable_of_a_user_stands_in_the_place_of_a_redistribution(redistribution: Any) -> None:
    mask = mask_of_lengths(3, 2, 0)
    rollout, scores = random_rollout(mask), random_scores(mask)
    placed = assign_credit(rollout, scores, CreditConfig(redistribution=redistribution)).token_level_scores
    assert placed.dtype == torch.float32
    wanted = torch.zeros(3, 3)
    wanted[:2, 0] = scores.scores[:2]
    torch.testing.assert_close(placed, wanted)


def test_a_callable_is_given_the_discount_and_the_steps() -> None:
    seen: dict[str, Any] = {}

    def listening(rollout: Rollout, scores: Scores, **more: Any) -> Tensor:
        seen.update(more)
        return first_token(rollout, scores)

    mask = mask_of_lengths(4)
    config = CreditConfig(redistribution=listening)
    config = replace(config, advantage=replace(config.advantage, gamma=0.9, per="token"))
    assign_credit(random_rollout(mask), random_scores(mask), config)
    assert seen["gamma"] == 0.9
    assert seen["steps"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(2, 2), r"returned torch.float32 \(2, 2\); return \(B, T\) float, here \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.long), r"returned torch.int64 \(2, 3\)"),
        ([[0.0]], r"returned list; return \(B, T\) float"),
    ],
)
def test_a_callable_that_answers_in_another_form_is_refused(answer: Any, message: str) -> None:
    mask = mask_of_lengths(3, 2)
    with pytest.raises(ValueError, match=message):
        place(lambda *_, **__: answer, random_rollout(mask), random_scores(mask))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda scores: scores, r"<lambda> is no redistribution \(too many positional arguments\)"),
        (lambda _, scores: scores, r"got an unexpected keyword argument 'gamma'"),
        ("Attention", r"redistribution is 'Attention'; give an instance, Attention\(...\)"),
        (Attention, r"redistribution is <class .*>; give an instance, Attention\(...\)"),
        (SimpleNamespace(), "SimpleNamespace is no redistribution"),
    ],
)
def test_what_cannot_be_called_as_a_redistribution_is_refused_before_any_work(wrong: Any, message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        CreditConfig(redistribution=wrong)
    with without_type_checks(), pytest.raises(ValueError, match=message):
        Weighted(redistribution=wrong, weight=1.0)


def test_needs_of_another_kind_are_refused() -> None:
    class Old(Asking):
        needs: Any = frozenset({"attention"})

    with without_type_checks(), pytest.raises(ValueError, match=r"Old.needs is frozenset.*give it an apportion.Needs"):
        CreditConfig(redistribution=Old())


def test_a_mixture_takes_a_mapping_and_heads_as_a_list() -> None:
    with without_type_checks():
        heads: Any = [0, 1]
        parts: Any = {Attention(heads=heads): 0.7, Uniform(): 0.3}
        found = Mixture(parts)
    assert found == Mixture.of({Attention(heads=(0, 1)): 0.7, Uniform(): 0.3})


def test_any_callable_can_be_shuffled() -> None:
    rollout = random_rollout(torch.ones(3, 6, dtype=torch.bool))

    def first(rollout: Rollout, scores: Scores, **_: Any) -> Tensor:
        paid = torch.zeros(rollout.response_mask.shape)
        paid[:, 0] = scores.scores
        return paid

    scores = Scores(scores=torch.tensor([1.0, 2.0, 3.0]))
    placed = Shuffled(first)(rollout, scores)
    torch.testing.assert_close(placed.sum(1), scores.scores)
    assert ((placed != 0).sum(1) == 1).all()
    assert not torch.equal(placed, first(rollout, scores, gamma=1.0, steps=None))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("termination", FixedNgram, r"termination is <class .*; give an instance, FixedNgram\(...\)"),
        ("advantage", "GRPO", r"advantage is 'GRPO'; give an instance, GRPO\(...\)"),
        ("advantage", 3, "advantage is 3; give GAE"),
        ("termination", 5, r"termination is 5; give a callable \(rollout\) -> \(B, T\) bool"),
        ("termination", None, "termination is None; give a callable"),
        ("value_smoothing", 5, "value_smoothing is 5; give a callable"),
        ("termination", Terminal(), r"termination is Terminal\(\), which takes other arguments \(missing"),
        ("termination", lambda: 5, r"which takes other arguments \(too many.*; give a callable \(rollout\)"),
        ("termination", trees, r"termination is <function trees .*, a parser; give ConstituencyParse\(backend=...\)"),
        ("termination", Stanza(), r"termination is Stanza\(.*, a parser; give ConstituencyParse\(backend=...\)"),
    ],
)
def test_a_class_or_a_name_in_place_of_an_instance_is_refused(name: str, value: Any, message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        CreditConfig(**{name: value})
