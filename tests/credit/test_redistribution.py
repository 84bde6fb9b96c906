"""Where the score lands: sums are kept, vectors are those of the documents, and controls only permute."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from apportion import (
    Attention,
    AttentionRequest,
    ErrorLine,
    FixedNgram,
    Mixture,
    Needs,
    PolicyAttention,
    PrefixDifference,
    Redistribution,
    Scores,
    Shuffled,
    Terminal,
    Uniform,
    macro_ids,
)
from apportion.batch import Rollout, rows
from apportion.credit.attention import attention_fallbacks
from apportion.credit.redistribution import at_end
from apportion.masked import ranks
from batches import (
    for_reference,
    mask_of,
    mask_of_lengths,
    padded,
    padded_scores,
    random_rollout,
    random_scores,
    reference_row,
    without_type_checks,
)

KEEPING = (
    Terminal(),
    Uniform(),
    Uniform(beta=0.3),
    Attention(),
    Attention(beta=1.0),
    PolicyAttention(),
    PolicyAttention(mode="last", legacy_shift=True),
    Mixture.of({Attention(beta=0.3): 0.2, PolicyAttention(): 0.3, PrefixDifference(from_prompt=False): 0.5}),
    ErrorLine(),
    ErrorLine(beta=0.3),
    PrefixDifference(from_prompt=False),
    PrefixDifference(beta=0.4, from_prompt=False),
    Shuffled(inner=Attention()),
    Shuffled(inner=Attention(beta=0.3), seed=2),
)
FROM_PROMPT = (PrefixDifference(), PrefixDifference(beta=0.4))
every_redistribution = pytest.mark.parametrize("redistribution", KEEPING + FROM_PROMPT, ids=str)

masks = st.integers(0, 14).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4).map(
        lambda rows: torch.tensor(rows, dtype=torch.bool).view(len(rows), width)
    )
)


def scores_at(numbers: list[float], **more: list[list[float]]) -> Scores:
    return Scores(scores=torch.tensor(numbers), **{name: torch.tensor(rows) for name, rows in more.items()})


def wanted_total(redistribution: Redistribution, scores: Scores, gamma: float, last_step: Tensor) -> Tensor:
    """The documents' invariant: sum_t gamma^(t-1) out_t = gamma^(n-1) R, less beta p_0 where p_0 is not 0."""
    total = gamma**last_step * scores.scores.double()
    if isinstance(redistribution, PrefixDifference) and redistribution.from_prompt:
        assert scores.prefix_scores is not None
        total = total - redistribution.beta * scores.prefix_scores[:, 0].double()
    return total


@every_redistribution
@given(mask=masks, seed=st.integers(0, 999))
@settings(max_examples=25)
def test_every_row_keeps_its_sum(redistribution: Redistribution, mask: Tensor, seed: int) -> None:
    """abc.md C2 and section 10 row 16, ma-rlhf.md section 4 row 15: at every length, mask and truncation."""
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    placed = redistribution(rollout, scores)
    assert placed.dtype == torch.float32
    assert torch.equal(placed[~mask], torch.zeros(int((~mask).sum())))
    wanted = torch.where(mask.any(1), wanted_total(redistribution, scores, 1.0, torch.zeros(len(mask))), 0)
    torch.testing.assert_close(placed.double().sum(1), wanted, atol=1e-5, rtol=0)


@every_redistribution
def test_long_rows_keep_their_sums(redistribution: Redistribution) -> None:
    mask = mask_of_lengths(2048, 1024, 777, 1)
    rollout, scores = random_rollout(mask), random_scores(mask)
    found = redistribution(rollout, scores).double().sum(1)
    torch.testing.assert_close(found, wanted_total(redistribution, scores, 1.0, torch.zeros(4)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 0.37])
@pytest.mark.parametrize(("deviation", "tokens", "atol"), [(1.0, 512, 1e-5), (3.0, 512, 4e-5), (10.0, 4096, 4e-4)])
def test_what_prefix_differences_lose_by_rounding_is_made_up_for(
    deviation: float, tokens: int, atol: float, beta: float
) -> None:
    """The exact sum is off by the rounding of the last token alone, whatever the opinions."""
    mask = mask_of_lengths(*[tokens] * 16)
    scores = random_scores(mask)
    assert scores.prefix_scores is not None
    scores = replace(scores, prefix_scores=deviation * scores.prefix_scores)
    placed = PrefixDifference(beta=beta)(random_rollout(mask), scores)
    wanted = wanted_total(PrefixDifference(beta=beta), scores, 1.0, torch.zeros(16))
    torch.testing.assert_close(placed.double().sum(1), wanted, atol=2e-6, rtol=0)
    assert ((placed.double().sum(1) - wanted).abs() <= 2**-24 * placed.double().abs().sum(1)).all()
    torch.testing.assert_close(placed.sum(1).double(), wanted, atol=atol, rtol=0)  # which rounds again


def test_shuffled_prefix_differences_keep_their_sums_too() -> None:
    mask = mask_of_lengths(*[512] * 64)
    scores = random_scores(mask)
    assert scores.prefix_scores is not None
    scores = replace(scores, scores=10 * scores.scores, prefix_scores=10 * scores.prefix_scores)
    found = Shuffled(PrefixDifference())(random_rollout(mask), scores).double().sum(1)
    wanted = wanted_total(PrefixDifference(), scores, 1.0, torch.zeros(64))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@every_redistribution
@pytest.mark.parametrize("per", ["token", "action"])
@given(mask=masks, seed=st.integers(0, 99), gamma=st.sampled_from([0.0, 0.5, 0.9, 0.99]))
@settings(max_examples=25)
def test_the_discounted_sum_is_that_of_the_score_at_the_end(
    redistribution: Redistribution, per: str, mask: Tensor, seed: int, gamma: float
) -> None:
    """abc.md C1: without the factor gamma^(n - t) early tokens are paid more than the score is worth."""
    if gamma == 0.0:
        mask = mask & (mask.cumsum(1) <= 1)  # only a first step is worth anything
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    steps = ranks(mask) if per == "token" else macro_ids(FixedNgram(n=3)(rollout), mask)
    placed = redistribution(rollout, scores, gamma=gamma, steps=steps)
    worth = torch.where(mask, gamma ** steps.clamp(min=0).double(), 0)
    last_step = torch.where(mask, steps, 0).amax(1) if mask.shape[1] else torch.zeros(len(mask))
    wanted = torch.where(mask.any(1), wanted_total(redistribution, scores, gamma, last_step.double()), 0)
    torch.testing.assert_close((worth * placed.double()).sum(1), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@every_redistribution
@given(mask=masks, seed=st.integers(0, 99))
@settings(max_examples=25)
def test_every_redistribution_equals_the_slow_loop(
    redistribution: Redistribution, gamma: float, mask: Tensor, seed: int
) -> None:
    if isinstance(redistribution, Shuffled):
        assert isinstance(redistribution.inner, Redistribution)
        redistribution = redistribution.inner
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    placed = redistribution(rollout, scores, gamma=gamma)
    options = reference.Options(termination=("every",), redistribution=for_reference(redistribution), gamma=gamma)
    for b, row in enumerate(mask):
        wanted = reference.redistribute(reference_row(rollout, scores, b), options, list(range(int(row.sum()))))
        assert placed[b, row].tolist() == pytest.approx(wanted, abs=1e-5)


def test_attention_is_normalised_over_the_response_and_mixed_with_the_end() -> None:
    """abc.md section 1, by hand: alpha = (1/6, 2/6, 3/6); what lies outside the response has no part."""
    rollout = random_rollout(mask_of([[1, 1, 1, 0], [0, 1, 1, 1]]))
    scores = scores_at([6.0, -6.0], attention=[[1.0, 2.0, 3.0, 9.0], [9.0, 1.0, 2.0, 3.0]])
    wanted = [[0.5, 1.0, 4.5, 0.0], [0.0, -0.5, -1.0, -4.5]]  # 0.5 R alpha_t, and 0.5 R at the end
    torch.testing.assert_close(Attention(beta=0.5)(rollout, scores), torch.tensor(wanted))


def test_the_scale_of_the_attention_does_not_matter() -> None:
    mask = mask_of_lengths(5, 3)
    rollout, scores = random_rollout(mask), random_scores(mask)
    assert scores.attention is not None
    for scale in 1e-30, 1e-3, 1e6, 3e38:  # at the last one the sum of a row is beyond float32
        scaled = replace(scores, attention=scores.attention * scale)
        torch.testing.assert_close(Attention()(rollout, scaled), Attention()(rollout, scores))
        assert attention_fallbacks(rollout, scaled) == 0


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_attention_that_is_not_finite_stays_at_the_end_and_is_counted(number: float) -> None:
    rollout = random_rollout(mask_of_lengths(3, 3))
    scores = scores_at([2.0, 6.0], attention=[[1.0, number, 1.0], [1.0, 1.0, 1.0]])
    placed = Attention(beta=1.0)(rollout, scores)
    torch.testing.assert_close(placed, torch.tensor([[0.0, 0, 2], [2, 2, 2]]))
    assert attention_fallbacks(rollout, scores) == 1
    assert reference.normalised([1.0, number, 1.0]) == [0, 0, 1]


@pytest.mark.parametrize("redistribution", [Attention(), Attention(beta=1.0), Shuffled(inner=Attention())], ids=str)
def test_attention_without_mass_stays_at_the_end_and_is_counted(redistribution: Redistribution) -> None:
    """abc.md section 10 row 18: zero mass gave NaN and an empty response an IndexError."""
    mask = mask_of([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]])
    nan = torch.nan
    scores = scores_at([2.0, nan, 3.0, 4.0], attention=[[0, 0, 5], [1, 1, 1], [nan, 1, 1], [1.0, 1, 1]])
    rollout = random_rollout(mask)
    placed = redistribution(rollout, scores)
    if not isinstance(redistribution, Shuffled):
        assert placed[:3].tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 3]]
    assert torch.equal(placed[~mask], torch.zeros(4))
    assert attention_fallbacks(rollout, scores) == 2  # the rows without mass and with NaN; the empty row is none
    assert attention_fallbacks(rollout, Scores(scores=scores.scores)) == 0


def test_uniform_obeys_beta() -> None:
    """abc.md section 10 row 11: the official Uniform ignored beta; the last token's extra is (1 - beta) R."""
    placed = Uniform(beta=0.8)(random_rollout(mask_of([[1, 0, 1, 1, 1, 0]])), scores_at([5.0]))
    torch.testing.assert_close(placed, torch.tensor([[1.0, 0, 1, 1, 2, 0]]))


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("provider", [Uniform, Attention, PolicyAttention, PrefixDifference])
def test_the_last_token_gets_an_extra_of_one_minus_beta(provider, beta: float) -> None:
    """abc.md section 10 row 11, for every provider: linear in beta between the ends."""
    mask = mask_of_lengths(4, 2)
    rollout, scores = random_rollout(mask), random_scores(mask)
    none, all_of_it = (provider(beta=b)(rollout, scores) for b in (0.0, 1.0))
    torch.testing.assert_close(provider(beta=beta)(rollout, scores), torch.lerp(none, all_of_it, beta))
    assert torch.equal(none, Terminal()(rollout, scores))


@pytest.mark.parametrize(("beta", "stops", "goes_on"), [(1.0, 0.12, 3.06), (0.8, 1.296, 3.648), (0.0, 6.0, 6.0)])
def test_reward_to_go_pays_for_a_longer_tail(beta: float, stops: float, goes_on: float) -> None:
    """abc.md section 6, R = 6, reward-to-go at t = 50 of a response that ends there, and of one that runs to 100."""
    placed = Uniform(beta=beta)(random_rollout(mask_of_lengths(50, 100)), scores_at([6.0, 6.0]))
    assert placed[:, 49:].sum(1).tolist() == pytest.approx([stops, goes_on], abs=1e-5)


def test_prefix_differences_by_hand() -> None:
    """abc.md section 3, RED: p = 1, 3, 2 and the score 5 in place of the last prefix; d = 2, -1, 3."""
    scores = scores_at([5.0], prefix_scores=[[1.0, 3, 2, 99, torch.nan]])
    rollout = random_rollout(mask_of([[1, 1, 1, 0]]))
    assert PrefixDifference()(rollout, scores).tolist() == [[2, -1, 3, 0]]
    assert PrefixDifference(from_prompt=False)(rollout, scores).tolist() == [[3, -1, 3, 0]]
    assert PrefixDifference(beta=0.5)(rollout, scores).tolist() == [[1, -0.5, 4, 0]]
    discounted = PrefixDifference()(rollout, scores, gamma=0.5)  # .5*3 - 1, .5*2 - 3, 5 - 2
    assert discounted.tolist() == [[0.5, -2, 3, 0]]
    one_action = PrefixDifference()(rollout, scores, gamma=0.5, steps=torch.tensor([[0, 0, 1, -1]]))
    assert one_action.tolist() == [[2, -2, 3, 0]]  # 3 - 1, .5*2 - 3, 5 - 2


def test_prefix_differences_pass_over_holes() -> None:
    """Tokens that the policy did not choose are paid nothing; what they changed goes to the next chosen token."""
    scores = scores_at([5.0], prefix_scores=[[1.0, 3, 70, 2, 60, 99]])
    rollout = random_rollout(mask_of([[1, 0, 1, 0, 1]]))
    assert PrefixDifference()(rollout, scores).tolist() == [[2, 0, -1, 0, 3]]
    assert PrefixDifference()(rollout, scores, gamma=0.5).tolist() == [[0.5, 0, -2, 0, 3]]


@given(mask=masks, seed=st.integers(0, 99))
def test_shuffling_permutes_inside_each_row(mask: Tensor, seed: int) -> None:
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    attention = Attention(beta=1.0)
    inner, shuffled = (r(rollout, scores) for r in (attention, Shuffled(inner=attention, seed=seed)))
    torch.testing.assert_close(shuffled.sort(1).values, inner.sort(1).values)
    assert torch.equal(shuffled[~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shuffled_prefix_differences_discount_the_bare_prompt_too(gamma: float) -> None:
    mask = mask_of_lengths(12, 5)
    rollout, scores = random_rollout(mask), random_scores(mask)
    assert scores.prefix_scores is not None
    placed = Shuffled(inner=PrefixDifference())(rollout, scores, gamma=gamma)
    last = gamma ** (mask.sum(1).double() - 1)
    found = (gamma ** ranks(mask).clamp(min=0).double() * placed.double()).sum(1)
    wanted = last * (scores.scores - scores.prefix_scores[:, 0]).double()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    from_zero = PrefixDifference(from_prompt=False)
    shuffled = Shuffled(inner=from_zero)(rollout, scores, gamma=gamma).double()
    found = (gamma ** ranks(mask).clamp(min=0).double() * shuffled).sum(1)
    torch.testing.assert_close(found, wanted_total(from_zero, scores, gamma, mask.sum(1) - 1.0), atol=1e-5, rtol=0)


def test_shuffling_leaves_the_remainder_at_the_end() -> None:
    mask = mask_of_lengths(50)
    scores = replace(random_scores(mask), scores=torch.tensor([10.0]))
    placed = Shuffled(inner=Uniform(beta=0.5))(random_rollout(mask), scores)
    torch.testing.assert_close(placed, Uniform(beta=0.5)(random_rollout(mask), scores))


def test_shuffles_are_even_and_differ_between_seeds() -> None:
    """Where the only share lands in rows of 4: chi-square with 3 degrees of freedom, above 16.3 once in a thousand."""
    rollout = random_rollout(mask_of_lengths(*[4] * 4000))
    ones = Scores(scores=torch.ones(4000))

    def all_at_the_first(rollout: Rollout, scores: Scores, **_: Any) -> Tensor:
        return at_end(scores.scores, rollout.response_mask.flip(1)).flip(1)

    first, second = (Shuffled(inner=all_at_the_first, seed=seed)(rollout, ones) for seed in (0, 1))
    assert ((first.sum(0) - 1000) ** 2 / 1000).sum() < 16.3
    assert 800 < (first * second).sum() < 1200  # the same place by chance in one row of four


@every_redistribution
@given(mask=masks, seed=st.integers(0, 99), left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=25)
def test_padding_changes_nothing(
    redistribution: Redistribution, mask: Tensor, seed: int, left: int, right: int
) -> None:
    """ma-rlhf.md section 4 row 15 and abc.md section 10 row 18: the score never lands on padding, on either side."""
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    wide = padded_scores(scores, left=left, right=right)
    placed = redistribution(padded(rollout, left=left, right=right, prompt_left=right), wide)
    torch.testing.assert_close(placed[:, left : left + mask.shape[1]], redistribution(rollout, scores))
    assert torch.equal(placed != 0, (placed != 0) & torch.nn.functional.pad(mask, (left, right)))


@every_redistribution
@given(mask=masks, seed=st.integers(0, 99), constant=st.booleans())
@settings(max_examples=25)
def test_a_row_in_a_batch_is_paid_as_alone_and_never_by_nan(
    redistribution: Redistribution, mask: Tensor, seed: int, constant: bool
) -> None:
    rollout, scores = random_rollout(mask, seed), random_scores(mask, seed)
    if constant:  # all scores alike, all weights alike
        fields = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
        flat = {name: torch.where(x.isnan(), x, 1.0) for name, x in fields.items() if x.is_floating_point()}
        scores = replace(scores, **flat)
    placed = redistribution(rollout, scores, gamma=0.9)
    assert placed.isfinite().all()
    for b in range(len(mask)):
        alone = redistribution(rows(rollout, slice(b, b + 1)), rows(scores, slice(b, b + 1)), gamma=0.9)
        torch.testing.assert_close(alone[0], placed[b])


@pytest.mark.parametrize("redistribution", KEEPING + FROM_PROMPT, ids=str)
def test_a_reward_model_in_bfloat16_is_read_in_float32(redistribution: Redistribution) -> None:
    """abc.md section 10 row 18: a bf16 reward model failed."""
    mask = mask_of_lengths(9, 4)
    rollout, scores = random_rollout(mask), random_scores(mask)
    fields = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
    half = replace(scores, **{name: x.bfloat16() for name, x in fields.items() if x.is_floating_point()})
    placed = redistribution(rollout, half)
    assert placed.dtype == torch.float32
    torch.testing.assert_close(placed, redistribution(rollout, scores), atol=0.05, rtol=0.02)


def test_needs_name_what_is_read() -> None:
    assert Terminal().needs == Uniform().needs == Needs()
    assert Terminal().needs.names == ()
    assert Shuffled(inner=Attention()).needs == Attention().needs == Needs(attention=AttentionRequest())
    assert PrefixDifference().needs == Needs(prefix_scores=True)
    chosen = Attention(layer=-2, heads=(0, 3), row="mean").needs
    assert chosen.attention == AttentionRequest(layer=-2, heads=(0, 3), row="mean")
    assert chosen.of_reward == chosen
    of_policy = PolicyAttention(mode="last", legacy_shift=True, layer=1).needs
    assert of_policy.policy_attention == AttentionRequest(layer=1, row="last", before_last=True)
    assert of_policy.names == ("policy_attention",)
    assert of_policy.of_reward == Needs()
    assert ErrorLine().needs.of_reward == Needs(error_tokens=True)


@pytest.mark.parametrize(
    ("redistribution", "message"),
    [
        (Attention(), r"Attention needs Scores.attention, which is None; ask the reward for it"),
        (Shuffled(inner=Attention()), r"Shuffled needs Scores.attention, which is None"),
        (PrefixDifference(), r"PrefixDifference needs Scores.prefix_scores, which is None"),
        (PolicyAttention(), r"PolicyAttention needs Scores.policy_attention, which is None; read it off the policy"),
        (ErrorLine(), r"ErrorLine needs Scores.error_tokens, which is None; ask the reward for it"),
        (Mixture.of({Attention(): 1.0}), r"Mixture needs Scores.attention, which is None"),
    ],
    ids=str,
)
def test_scores_without_what_is_needed_are_refused(redistribution: Redistribution, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        redistribution(random_rollout(mask_of_lengths(3, 2)), scores_at([1.0, 2.0]))


@pytest.mark.parametrize(
    ("redistribution", "change", "message"),
    [
        (Attention(), {"attention": torch.ones(2, 4)}, r"attention has shape \(2, 4\); the responses need \(2, 3\)"),
        (PolicyAttention(), {"policy_attention": torch.ones(2, 4)}, r"policy_attention has shape \(2, 4\); the resp"),
        (PrefixDifference(), {"prefix_scores": torch.ones(2, 3)}, r"\(2, 3\); the responses need \(2, 4\)"),
        (Terminal(), {}, r"scores has 1 entries; there are 2 responses"),
        (Uniform(), {}, r"scores has 1 entries; there are 2 responses"),
        (Shuffled(inner=Uniform()), {}, r"scores has 1 entries; there are 2 responses"),
    ],
    ids=str,
)
def test_scores_of_another_shape_are_refused(redistribution: Redistribution, change: dict, message: str) -> None:
    """One score would broadcast to all rows without a word."""
    rollout = random_rollout(mask_of_lengths(3, 2))
    scores = Scores(scores=torch.ones(2 if change else 1), **change)
    with pytest.raises(ValueError, match=message):
        redistribution(rollout, scores)


@pytest.mark.parametrize("provider", [Uniform, Attention, PolicyAttention, PrefixDifference])
@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_a_beta_that_is_no_weight_is_refused(provider, beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta is {beta}; choose a number in \[0, 1\]"):
        provider(beta=beta)


def test_weights_of_the_policy_are_normalised_over_the_response() -> None:
    """abc.md section 2: alpha = w / sum w, then as in section 1; alpha = (1/6, 2/6, 3/6)."""
    rollout = random_rollout(mask_of([[1, 1, 1, 0], [0, 1, 1, 1]]))
    scores = scores_at([6.0, -6.0], policy_attention=[[1.0, 2.0, 3.0, 9.0], [9.0, 1.0, 2.0, 3.0]])
    wanted = [[0.5, 1.0, 4.5, 0.0], [0.0, -0.5, -1.0, -4.5]]
    torch.testing.assert_close(PolicyAttention(beta=0.5)(rollout, scores), torch.tensor(wanted))


# abc.md section 2, n = 4: what the rows [.5], [.4 .1], [.3 .1 .1] of generation give before they are normalised.
GENERATED = {"mean": [0.4, 0.1, 0.1, 0.0], "last": [0.3, 0.1, 0.1, 0.0]}
CORRECT = {"mean": [2 / 3, 1 / 6, 1 / 6, 0], "last": [0.6, 0.2, 0.2, 0]}
OFFICIAL = {"mean": [0, 2 / 3, 1 / 6, 1 / 6], "last": [0, 0.6, 0.2, 0.2]}


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize(("legacy", "wanted"), [(False, CORRECT), (True, OFFICIAL)])
def test_the_official_shift_is_reproduced_only_when_asked(mode, legacy: bool, wanted: dict) -> None:
    """abc.md sections 2 and 10 row 1, also where holes lie between the tokens."""
    policy = PolicyAttention(beta=1.0, mode=mode, legacy_shift=legacy)
    scores = scores_at([1.0], policy_attention=[GENERATED[mode]])
    assert policy(random_rollout(mask_of([[1, 1, 1, 1]])), scores).tolist()[0] == pytest.approx(wanted[mode])
    weights = GENERATED[mode]
    apart = scores_at([1.0], policy_attention=[[weights[0], 9.0, weights[1], 9.0, weights[2], weights[3], 9.0]])
    mask = mask_of([[1, 0, 1, 0, 1, 1, 0]])
    assert policy(random_rollout(mask), apart)[mask].tolist() == pytest.approx(wanted[mode])


def test_attention_all_on_the_first_token_pays_the_first_token() -> None:
    """abc.md section 10 row 1; the official code pays the second."""
    scores = scores_at([3.0], policy_attention=[[1.0, 0, 0]])
    rollout = random_rollout(mask_of_lengths(3))
    assert PolicyAttention(beta=1.0)(rollout, scores).tolist() == [[3, 0, 0]]
    assert PolicyAttention(beta=1.0, legacy_shift=True)(rollout, scores).tolist() == [[0, 3, 0]]


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_the_policy_without_mass_stay_at_the_end_and_are_counted(legacy: bool) -> None:
    """A response of one token has no row of generation; neither NaN nor an empty row spoils anything."""
    mask = mask_of([[1, 0], [0, 0], [1, 1]])
    scores = scores_at([2.0, torch.nan, 3.0], policy_attention=[[0.0, 5], [1, 1], [torch.nan, 1]])
    rollout = random_rollout(mask)
    placed = PolicyAttention(legacy_shift=legacy)(rollout, scores)
    assert placed.tolist() == [[2, 0], [0, 0], [0, 3]]
    assert attention_fallbacks(rollout, scores) == 2
    both = replace(scores, attention=torch.tensor([[0.0, 0], [1, 1], [1, 1]]))
    assert attention_fallbacks(rollout, both) == 2  # a response that lacks both is counted once


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PolicyAttention, {"mode": "max"}, "mode is 'max'; choose 'mean'"),
        (Attention, {"row": "first"}, "row is 'first'; choose 'read', 'last' or 'mean'"),
        (Attention, {"heads": ()}, r"heads is \(\); list heads from 0"),
        (PolicyAttention, {"heads": (1, -1)}, r"heads is \(1, -1\); list heads from 0"),
        (Attention, {"heads": (1, 1)}, r"heads is \(1, 1\); list heads from 0, each once"),
        (PolicyAttention, {"heads": 3}, "heads is 3; list heads from 0"),
        (PolicyAttention, {"heads": (0, 0.5)}, r"heads is \(0, 0\.5\); list heads"),
        (Attention, {"heads": "0"}, "heads is '0'; list heads"),
        (PolicyAttention, {"layer": "last"}, "layer is 'last'; give a whole number"),
        (Attention, {"layer": 1.5}, r"layer is 1\.5; give a whole number"),
        (PolicyAttention, {"legacy_shift": "no"}, "legacy_shift is 'no'; choose True"),
        (Attention, {"beta": "x"}, "beta is 'x'; choose a number in"),
        (Uniform, {"beta": True}, "beta is True; choose a number in"),
    ],
)
def test_a_setting_without_a_meaning_is_refused(kind: type[Redistribution], settings: dict, message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        kind(**settings)
