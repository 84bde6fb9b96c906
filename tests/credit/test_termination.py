"""Where macro actions close: the documents' vectors, and what holds of every condition."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from apportion import (
    CreditConfig,
    Entropy,
    EveryToken,
    FixedNgram,
    LowProbability,
    Perplexity,
    RandomizedNgram,
    ShuffledBoundaries,
    TerminationCondition,
    WholeResponse,
    macro_ids,
)
from apportion.credit.assign import segment
from apportion.credit.macro_actions import macro_lengths
from apportion.credit.row_keys import orders
from batches import mask_of, mask_of_lengths, padded, random_rollout, spoiled, without_type_checks

CONDITIONS: tuple[TerminationCondition, ...] = (
    EveryToken(),
    FixedNgram(n=1),
    FixedNgram(n=3),
    FixedNgram(n=512),
    RandomizedNgram(lengths=(1, 2, 3), repeats=2, seed=3),
    RandomizedNgram(),
    Perplexity(variant="token"),
    Perplexity(variant="token", early=True),
    Perplexity(variant="segment"),
    Entropy(threshold=1.5),
    LowProbability(threshold=0.2),
    WholeResponse(),
    ShuffledBoundaries(inner=FixedNgram(n=3)),
)
every_condition = pytest.mark.parametrize("condition", CONDITIONS, ids=str)

masks = st.integers(0, 20).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5).map(
        lambda rows: torch.tensor(rows, dtype=torch.bool).view(len(rows), width)
    )
)


def sizes(condition: TerminationCondition, tokens: int, *, preset: str = "paper") -> list[int]:
    """Segment one row of so many tokens, padded by two."""
    rollout = random_rollout(mask_of_lengths(tokens, width=tokens + 2))
    ids = segment(rollout, getattr(CreditConfig, preset)(termination=condition))[0]
    return reference.sizes(ids[ids >= 0].tolist())


def ids_by_perplexity(perplexities: list[float], condition: TerminationCondition, preset: str = "paper") -> list[int]:
    rollout = random_rollout(mask_of_lengths(len(perplexities)))
    rollout = replace(rollout, ref_logprobs=-torch.tensor([perplexities]).log())
    return segment(rollout, getattr(CreditConfig, preset)(termination=condition))[0].tolist()


O1 = [
    (8, 5, [5, 3], [5, 2, 1], [5, 2, 1]),
    (6, 5, [5, 1], [5, 0, 1], [5, 1]),
    (5, 5, [5], [4, 1], [4, 1]),
    (11, 5, [5, 5, 1], [5, 5, 0, 1], [5, 5, 1]),
    (8, 1, [1] * 8, [1] * 7 + [0, 1], [1] * 8),
    (1, 5, [1], [0, 1], [1]),
    (8, 512, [8], [7, 1], [7, 1]),
]


@pytest.mark.parametrize(("tokens", "n", "paper", "released", "official"), O1)
def test_o1_sizes_of_fixed_ngrams(tokens: int, n: int, paper: list, released: list, official: list) -> None:
    """ma-rlhf.md O1 and section 4 row 2: the official preset is the released code without its empty steps."""
    assert sizes(FixedNgram(n=n), tokens) == paper
    assert sizes(FixedNgram(n=n), tokens, preset="official") == official
    assert reference.official_sizes(tokens, n) == released
    assert [m for m in released if m] == official


def test_o3_random_ngrams_use_up_their_lengths() -> None:
    """ma-rlhf.md O3: 60 tokens are covered and 140 left in the paper; 63, 136 and 1 with the official settings."""
    *covered, rest = sizes(RandomizedNgram(), 200)
    assert sorted(covered) == sorted([2, 3, 5, 10] * 3)
    assert rest == 140
    *covered, rest, last = sizes(RandomizedNgram(lengths=(1, 2, 3, 5, 10), repeats=3), 200, preset="official")
    assert sorted(covered) == sorted([1, 2, 3, 5, 10] * 3)
    assert (rest, last) == (136, 1)


def test_o4_perplexity_closes_before_the_rise() -> None:
    """ma-rlhf.md O4 and section 4 rows 3 and 4: the official boundary lay one token early, and in practice nowhere."""
    perplexities = [5.0, 3.0, 2.0, 4.0, 1.0, 6.0]
    assert ids_by_perplexity(perplexities, Perplexity()) == [0, 0, 0, 1, 1, 2]
    assert ids_by_perplexity(perplexities, Perplexity(variant="segment")) == [0, 0, 0, 1, 1, 2]
    assert ids_by_perplexity(perplexities, Perplexity(early=True), "official") == [0, 0, 1, 1, 2, 3]
    assert ids_by_perplexity(perplexities, WholeResponse(), "official") == [0, 0, 0, 0, 0, 1]


def test_o4_the_variants_differ_where_a_rise_stays_below_the_mean() -> None:
    assert ids_by_perplexity([5.0, 1.0, 2.0], Perplexity()) == [0, 0, 1]
    assert ids_by_perplexity([5.0, 1.0, 2.0], Perplexity(variant="segment")) == [0, 0, 0]


def test_varied_perplexities_give_many_actions() -> None:
    """ma-rlhf.md section 4 row 3: the official selector saw one wrapped list and closed nothing."""
    rollout = random_rollout(mask_of_lengths(100, 80))
    for condition in Perplexity(), Perplexity(variant="segment"):
        assert (segment(rollout, CreditConfig(termination=condition)).amax(1) + 1 > 10).all()


@every_condition
@given(mask=masks, seed=st.integers(0, 99))
@settings(max_examples=25)
def test_every_condition_numbers_every_row_soundly(condition: TerminationCondition, mask: Tensor, seed: int) -> None:
    """ma-rlhf.md section 0, for rows of different lengths, with holes, of one token, or of padding alone."""
    rollout = random_rollout(mask, seed, grid=0.25)
    closes = condition(rollout)
    assert closes.dtype == torch.bool
    assert not (closes & ~mask).any()
    for row, ids in zip(mask, macro_ids(closes, mask), strict=True):
        of_tokens = ids[row].tolist()
        assert of_tokens == sorted(of_tokens)
        assert set(of_tokens) == set(range(len(set(of_tokens))))
        assert (ids[~row] == -1).all()
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    assert (closes | ~last).all()


@every_condition
@given(mask=masks, seed=st.integers(0, 99), left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=25)
def test_padding_and_holes_do_not_move_boundaries(
    condition: TerminationCondition, mask: Tensor, seed: int, left: int, right: int
) -> None:
    """ma-rlhf.md section 0: nothing depends on the side or the amount of padding; holes count as padding."""
    rollout = random_rollout(mask, seed, grid=0.25)
    wide = condition(padded(rollout, left=left, right=right, prompt_left=left))
    closes = condition(rollout)
    assert torch.equal(wide[:, left : left + mask.shape[1]], closes)
    for b, row in enumerate(mask):
        alone = random_rollout(row[row][None])
        alone = replace(
            alone,
            prompt_ids=rollout.prompt_ids[b : b + 1],
            prompt_mask=rollout.prompt_mask[b : b + 1],
            response_ids=rollout.response_ids[b : b + 1, row],
            old_logprobs=rollout.old_logprobs[b : b + 1, row],
            ref_logprobs=rollout.ref_logprobs[b : b + 1, row],
            entropies=None if rollout.entropies is None else rollout.entropies[b : b + 1, row],
        )
        assert torch.equal(condition(alone)[0], closes[b, row])


@every_condition
def test_the_same_rollout_always_gives_the_same_boundaries(condition: TerminationCondition) -> None:
    rollout = random_rollout(mask_of_lengths(30, 12, 1))
    torch.manual_seed(0)
    first = condition(rollout)
    torch.manual_seed(1)
    assert torch.equal(condition(rollout), first)


@given(mask=masks, seed=st.integers(0, 999), variant=st.sampled_from(["token", "segment"]), tied=st.booleans())
def test_perplexity_equals_the_slow_loop(mask: Tensor, seed: int, variant, tied: bool) -> None:
    rollout = random_rollout(mask, seed, grid=0.5 if tied else None)
    ids = macro_ids(Perplexity(variant=variant)(rollout), mask)
    for b, row in enumerate(mask):
        assert ids[b, row].tolist() == reference.perplexity(rollout.ref_logprobs[b, row].tolist(), variant)


@pytest.mark.parametrize("shape", ["rising", "falling", "constant", "sawtooth", "random walk"])
@pytest.mark.parametrize("width", [1, 2, 3, 64, 65, 300])
def test_segment_perplexity_equals_the_slow_loop_on_long_rows(shape: str, width: int) -> None:
    steps = torch.arange(width, dtype=torch.float32)
    surprise = {
        "rising": torch.cat([torch.tensor([40.0]), steps / 8])[:width],
        "falling": -steps / 8,
        "constant": torch.full((width,), 0.1),
        "sawtooth": steps % 7 + steps / 64,
        "random walk": torch.randn(width, generator=torch.Generator().manual_seed(0)).cumsum(0),
    }[shape]
    rollout = replace(random_rollout(mask_of_lengths(width)), ref_logprobs=-surprise[None])
    ids = macro_ids(Perplexity(variant="segment")(rollout), rollout.response_mask)
    assert ids[0].tolist() == reference.perplexity((-surprise).tolist(), "segment")


def test_a_token_of_high_entropy_or_low_probability_begins_an_action() -> None:
    """related.md, Segment RM and SAE: entropies 2, .5, 1.8, 1.75, 3 over 1.75 at the third and the fifth token."""
    rollout = random_rollout(mask_of([[1, 1, 1, 1, 0, 1]]))
    entropies = torch.tensor([[2.0, 0.5, 1.8, 1.75, 9.0, 3.0]])
    probabilities = torch.tensor([[0.01, 0.9, 0.19, 0.2, 0.0, 0.1]])
    rollout = replace(rollout, entropies=entropies, old_logprobs=probabilities.log())
    wanted = [[0, 0, 1, 1, -1, 2]]
    for condition in Entropy(1.75), LowProbability(0.2):
        assert macro_ids(condition(rollout), rollout.response_mask).tolist() == wanted


@given(mask=masks, seed=st.integers(0, 999), threshold=st.floats(0.05, 2.5))
def test_thresholds_equal_the_slow_loop(mask: Tensor, seed: int, threshold: float) -> None:
    rollout = random_rollout(mask, seed)
    assert rollout.entropies is not None
    chance = math.exp(-threshold)
    entropy, unlikely = (
        macro_ids(condition(rollout), mask) for condition in (Entropy(threshold), LowProbability(chance))
    )
    for b, row in enumerate(mask):
        unsure = [h > threshold for h in rollout.entropies[b, row].tolist()]
        assert entropy[b, row].tolist() == reference.by_threshold(unsure)
        low = [logprob < math.log(chance) for logprob in rollout.old_logprobs[b, row].tolist()]
        assert unlikely[b, row].tolist() == reference.by_threshold(low)


@given(mask=masks, seed=st.integers(0, 99))
def test_thresholds_reach_from_one_action_a_token_to_one_a_response(mask: Tensor, seed: int) -> None:
    """related.md, Segment RM: a threshold of 0 is PPO, one that is never reached a bandit."""
    rollout = random_rollout(mask, seed)
    for all_tokens, whole in (Entropy(0), Entropy(1000.0)), (LowProbability(1.0), LowProbability(0.0)):
        assert torch.equal(all_tokens(rollout), EveryToken()(rollout))
        assert torch.equal(whole(rollout), WholeResponse()(rollout))


def test_entropy_without_entropies_is_refused() -> None:
    rollout = replace(random_rollout(mask_of_lengths(3)), entropies=None)
    with pytest.raises(ValueError, match=r"Entropy needs Rollout.entropies, which is None; gather them while sampling"):
        Entropy()(rollout)


@given(mask=masks, seed=st.integers(0, 99))
def test_random_ngrams_deal_a_shuffle_of_their_lengths(mask: Tensor, seed: int) -> None:
    lengths = (1, 2, 3, 5)
    ids = macro_ids(RandomizedNgram(lengths=lengths, repeats=1, seed=seed)(random_rollout(mask, seed)), mask)
    for row, valid in zip(ids, mask, strict=True):
        dealt = reference.sizes(row[valid].tolist())
        left: list[int] = list(lengths)
        for m in dealt[:-1]:  # the last may be cut short, or hold the rest
            left.remove(m)
        assert len(dealt) <= len(lengths) + 1


def test_random_ngrams_differ_between_rows_and_seeds() -> None:
    rollout = random_rollout(mask_of_lengths(*[60] * 20))
    first, second = (RandomizedNgram(seed=seed)(rollout) for seed in (0, 1))
    assert len(first.unique(dim=0)) > 15
    assert (first != second).any(1).sum() > 15


def test_every_order_of_lengths_is_equally_likely() -> None:
    """Chi-square with 5 degrees of freedom: above 20.5 once in a thousand."""
    rollout = random_rollout(mask_of_lengths(*[6] * 3000))
    ids = macro_ids(RandomizedNgram(lengths=(1, 2, 3), repeats=1)(rollout), rollout.response_mask)
    orders = ids.unique(dim=0, return_counts=True)[1].double()
    assert len(orders) == 6
    assert ((orders - 500) ** 2 / 500).sum() < 20.5


def test_token_ids_of_half_the_width_deal_the_same_lengths() -> None:
    rollout = random_rollout(mask_of_lengths(30, 20))
    narrow = replace(rollout, response_ids=rollout.response_ids.int(), prompt_ids=rollout.prompt_ids.int())
    assert torch.equal(RandomizedNgram()(narrow), RandomizedNgram()(rollout))


def test_a_response_without_end_or_without_tokens_is_segmented() -> None:
    """ma-rlhf.md section 4 row 7: truncated and empty responses stopped training."""
    rollout = random_rollout(mask_of([[1, 1, 1], [0, 0, 0]]))
    for condition in CONDITIONS:
        ids = macro_ids(condition(rollout), rollout.response_mask)
        assert (ids[0] >= 0).all()
        assert ids[1].tolist() == [-1, -1, -1]


@every_condition
@pytest.mark.parametrize("width", [0, 1, 17, 40])
def test_a_batch_without_rows_is_segmented(condition: TerminationCondition, width: int) -> None:
    assert condition(random_rollout(torch.ones(0, width, dtype=torch.bool))).shape == (0, width)


def test_a_length_beyond_the_response_costs_no_memory() -> None:
    rollout = random_rollout(mask_of_lengths(30, 7))
    closes = RandomizedNgram(lengths=(3, 10**18), repeats=4)(rollout)
    capped = RandomizedNgram(lengths=(3, 31), repeats=4)(rollout)
    assert torch.equal(closes, capped)
    assert closes.sum() >= 2
    assert torch.equal(FixedNgram(n=10**30)(rollout), WholeResponse()(rollout))


def test_what_draws_with_one_seed_draws_independently() -> None:
    """Lengths are not dealt in the order in which `Shuffled` would place as many shares."""
    rollout = random_rollout(torch.ones(500, 78, dtype=torch.bool))
    dealt = RandomizedNgram(lengths=tuple(range(1, 13)), repeats=1)(rollout)
    lengths = macro_lengths(macro_ids(dealt, rollout.response_mask))[:, :12]
    first = torch.ones(500, 12, dtype=torch.bool)
    assert (lengths != orders(rollout, 0, first) + 1).any(1).all()


def test_a_row_does_not_take_the_boundaries_of_the_first() -> None:
    """ma-rlhf.md section 4 row 14: the official code read boundaries from row 0."""
    rollout = random_rollout(mask_of_lengths(3, 7))
    assert FixedNgram(n=3)(rollout).int().tolist() == [[0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 1]]


def test_any_callable_is_a_condition() -> None:
    rollout = random_rollout(mask_of_lengths(4, 2))
    config = CreditConfig(termination=lambda rollout: rollout.response_ids >= 0)
    assert segment(rollout, config).tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rollout: rollout.response_mask.long(), r"has dtype torch.int64 .*; return \(B, T\) bool"),
        (lambda rollout: rollout.response_mask[:1], r"shape \(1, 4\); return \(B, T\) bool, here \(2, 4\)"),
        (lambda rollout: rollout.response_mask[:, :1], r"shape \(2, 1\); return \(B, T\) bool, here \(2, 4\)"),
        (lambda _: None, r"the termination returned is None; return \(B, T\) bool"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_condition_that_answers_in_another_form_is_refused(answer, message: str, wrapped: bool) -> None:
    with without_type_checks():
        config = CreditConfig(termination=ShuffledBoundaries(answer) if wrapped else answer)
        with pytest.raises(ValueError, match=message):
            segment(random_rollout(mask_of_lengths(4, 2)), config)


def test_half_precision_log_probabilities_are_compared_as_they_are() -> None:
    rollout = random_rollout(mask_of_lengths(40, 30))
    half = replace(rollout, ref_logprobs=rollout.ref_logprobs.bfloat16())
    for condition in Perplexity(), Perplexity(variant="segment"):
        assert torch.equal(condition(half), condition(replace(half, ref_logprobs=half.ref_logprobs.float())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedNgram(n=0), "n is 0; an n-gram has at least 1 token"),
        (lambda: FixedNgram(n=2.5), r"n is 2\.5, which counts no tokens; give a whole number"),  # pyright: ignore
        (lambda: FixedNgram(n=True), "n is True, which counts no tokens"),
        (lambda: RandomizedNgram(lengths=(2, 0.5)), r"lengths is 0\.5, which counts no tokens"),  # pyright: ignore
        (lambda: RandomizedNgram(repeats=1.5), r"repeats is 1\.5, which counts no tokens"),  # pyright: ignore
        (lambda: RandomizedNgram(lengths=()), r"lengths is \(\); give at least one length"),
        (lambda: RandomizedNgram(lengths=(2, 0)), r"lengths is \(2, 0\); give at least one length, each at least 1"),
        (lambda: RandomizedNgram(repeats=0), "repeats is 0; each length occurs at least once"),
        (lambda: Entropy(threshold=-0.5), r"threshold is -0.5; choose a number of at least 0, in nats"),
        (lambda: Entropy(threshold=float("nan")), "threshold is nan; choose a number"),
        (lambda: LowProbability(threshold=1.5), r"threshold is 1.5; choose a probability in \[0, 1\]"),
        (lambda: Perplexity(variant="mean"), "variant is 'mean'; choose 'token' or 'segment'"),  # pyright: ignore
        (lambda: Perplexity(variant="segment", early=True), "early is True with variant 'segment'"),
        (lambda: ShuffledBoundaries(FixedNgram), r"inner is <class .*; give an instance, FixedNgram\(...\)"),
        (lambda: ShuffledBoundaries("Perplexity"), r"inner is 'Perplexity'; give an instance"),  # pyright: ignore
        (lambda: ShuffledBoundaries(FixedNgram(), seed=1.5), r"seed is 1\.5; give a whole number"),  # pyright: ignore
        (lambda: RandomizedNgram(seed="a"), "seed is 'a'; give a whole number"),  # pyright: ignore
        (lambda: RandomizedNgram(lengths=5), "lengths is 5; give several whole numbers"),  # pyright: ignore
        (lambda: Entropy(True), "threshold is True; choose a number of at least 0"),
        (lambda: LowProbability(False), "threshold is False; choose a probability"),
        (lambda: Entropy("a"), "threshold is 'a'; choose a number of at least 0"),  # pyright: ignore
        (lambda: LowProbability("a"), "threshold is 'a'; choose a probability"),  # pyright: ignore
    ],
)
def test_settings_without_a_meaning_are_refused(make, message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        make()


def test_an_infinite_surprise_opens_an_action_that_no_token_exceeds() -> None:
    rollout = random_rollout(torch.ones(1, 9, dtype=torch.bool))
    surprise = torch.tensor([[2.0, 1.0, torch.inf, 1.0, 5.0, 1.0, torch.inf, 1.0, 9.0]])
    found = Perplexity("segment")(replace(rollout, ref_logprobs=-surprise))
    assert found.nonzero()[:, 1].tolist()[0] == 1
    assert found.nonzero()[:, 1].tolist()[-1] == 8
    assert not found[0, 2:5].any()


def test_junk_in_the_padding_of_a_rollout_is_not_read() -> None:
    rollout = random_rollout(mask_of([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]))
    other = spoiled(replace(rollout, response_ids=rollout.response_ids + 1000 * (~rollout.response_mask)))
    for condition in CONDITIONS:
        assert torch.equal(condition(other), condition(rollout))


@pytest.mark.parametrize("condition", [*CONDITIONS, ShuffledBoundaries(inner=Perplexity())], ids=str)
def test_where_nobody_looks_for_holes_the_boundaries_are_the_same(
    condition: TerminationCondition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another device than a CPU, where to look would be to wait."""
    lengths = torch.randint(0, 40, (50,), generator=torch.Generator().manual_seed(0))
    mask = mask_of_lengths(*lengths.tolist(), width=41)
    mask[25:, 5:8] = False
    rollout = random_rollout(mask)
    looked = condition(rollout)
    monkeypatch.setattr("apportion.masked._are_in_place", lambda _: False)
    assert torch.equal(condition(replace(rollout)), looked)


@given(mask=masks, seed=st.integers(0, 99))
@settings(max_examples=50)
def test_shuffled_boundaries_leave_the_same_lengths_in_every_row(mask: Tensor, seed: int) -> None:
    """ma-rlhf.md section 8, control 5: the same multiset of lengths, in random order."""
    rollout = random_rollout(mask, seed)
    for inner in (Perplexity(), FixedNgram(n=3)):
        lengths = [
            macro_lengths(macro_ids(condition(rollout), mask)).sort(1).values
            for condition in (inner, ShuffledBoundaries(inner=inner, seed=seed))
        ]
        assert torch.equal(*lengths)


def test_shuffled_boundaries_come_in_every_order_alike_and_depend_on_seed_and_row() -> None:
    rollout = random_rollout(torch.ones(4000, 11, dtype=torch.bool))
    closes = ShuffledBoundaries(inner=FixedNgram(n=5))(rollout)  # lengths of 5, 5 and 1
    assert closes[:, -1].all()
    shares = closes.float().mean(0)
    third = torch.tensor([1, 0, 0, 0, 2, 1, 0, 0, 0, 2, 3]) / 3  # 1 5 5: 0, 5; 5 1 5: 4, 5; 5 5 1: 4, 9
    third[5], third[9] = 2 / 3, 1 / 3
    torch.testing.assert_close(shares, third, atol=0.03, rtol=0)
    other = ShuffledBoundaries(inner=FixedNgram(n=5), seed=1)(rollout)
    assert 0.5 < (closes != other).any(1).float().mean() < 0.8
