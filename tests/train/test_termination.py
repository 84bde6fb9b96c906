"""What a trainer does for a termination condition that reads texts or entropies."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import parsers
from apportion import (
    ConstituencyParse,
    CreditConfig,
    Delimiter,
    Entropy,
    EveryToken,
    LowProbability,
    PPOTrainer,
    Rollout,
)
from apportion.credit.assign import Condition
from apportion.rollout import sample
from apportion.sampling import Sampling
from apportion.score.text import with_text
from apportion.train.run import read_records
from trainers import learned, metrics, run, trainer


def parsed(**changes) -> ConstituencyParse:
    return ConstituencyParse(cutoff=3, workers=1, backend=parsers.pairs, **changes)


def credit(condition: Condition) -> CreditConfig:
    return CreditConfig(kl_coef=0.05, termination=condition)


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "apportion.parsing.worker" in p.cmdline()]


CONDITIONS = (parsed(), Delimiter("w1"), Entropy(3.775), LowProbability(0.02))


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: type(condition).__name__)
def test_a_run_divides_responses_by_what_they_say(condition: Condition, tmp_path: Path) -> None:
    run(tmp_path, credit=credit(condition), num_steps=2)
    for record in metrics(tmp_path):
        assert 1 < record["credit/actions"] < record["rollout/length"]
        assert record["credit/parse_fallbacks"] == 0
    assert not workers()


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: type(condition).__name__)
def test_values_are_smoothed_over_what_responses_say(condition: Condition, tmp_path: Path) -> None:
    """A condition of `value_smoothing` is given what one of `termination` is."""
    plain = run(tmp_path / "plain", credit=CreditConfig(termination=EveryToken()), num_steps=2)
    config = CreditConfig(termination=EveryToken(), value_smoothing=condition)
    smoothed = run(tmp_path / "smoothed", credit=config, num_steps=2)
    assert any(not torch.equal(x, y) for x, y in zip(learned(plain), learned(smoothed), strict=True))
    assert not workers()


def test_the_time_of_parsing_is_logged_where_text_is_read(tmp_path: Path) -> None:
    run(tmp_path / "parse", credit=credit(parsed()), num_steps=1)
    run(tmp_path / "ngram", num_steps=1)
    (by_parse,), (by_number,) = (read_records(tmp_path / name / "metrics.jsonl") for name in ("parse", "ngram"))
    assert by_parse["time/parse"] > 0
    assert "time/parse" not in by_number


def test_responses_that_cannot_be_parsed_do_not_stop_training_and_are_counted(tmp_path: Path) -> None:
    condition = replace(parsed(), backend=Unlucky())
    with pytest.warns(UserWarning, match="none of 8 responses could be parsed"):
        run(tmp_path, credit=credit(condition), num_steps=2)
    for record in metrics(tmp_path):
        assert record["credit/parse_fallbacks"] == 8
        assert record["credit/action_length"] == 1


def test_responses_that_cannot_be_parsed_to_smooth_values_are_counted(tmp_path: Path) -> None:
    condition = replace(parsed(), backend=Unlucky())
    with pytest.warns(UserWarning, match="none of 8 responses could be parsed"):
        run(tmp_path, credit=CreditConfig(termination=EveryToken(), value_smoothing=condition), num_steps=1)
    (record,) = metrics(tmp_path)
    assert record["credit/parse_fallbacks"] == 8


@dataclass(frozen=True)
class Unlucky(parsers.Slow):
    """Parse nothing."""

    def __call__(self, text: str) -> list:
        """Fail."""
        raise RuntimeError(text)


def test_a_parser_that_is_missing_is_told_before_anything_is_written(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", credit=credit(replace(parsed(), backend=parsers.Dying())))
    with pytest.raises(ValueError, match="the parser cannot be loaded"):
        made.train()
    assert not (tmp_path / "run").exists()
    assert not workers()


def test_no_process_stays_behind_a_run_that_fails(tmp_path: Path) -> None:
    def broken(**_: object) -> list[float]:
        assert workers()
        raise RuntimeError("the reward is down")

    made = trainer(tmp_path, credit=credit(parsed()), roles={"reward_model": broken})
    with pytest.raises(RuntimeError, match="the reward is down"):
        made.train()
    assert not workers()


class Watching:
    """A condition of a user's own, that notes what it is called with."""

    needs = frozenset({"text", "entropies"})

    def __init__(self) -> None:
        self.prepared: list[Rollout] = []
        self.called: list[Rollout] = []

    def prepare(self, rollout: Rollout) -> None:
        self.prepared.append(rollout)

    def __call__(self, rollout: Rollout) -> Tensor:
        self.called.append(rollout)
        return rollout.response_mask


def test_a_condition_of_ones_own_gets_what_it_needs_before_the_reward_is_asked(tmp_path: Path) -> None:
    condition = Watching()

    def reward(completions: list[str], **_: object) -> list[float]:
        assert condition.prepared
        assert condition.prepared[-1].text is not None
        assert [text.strip() for text in condition.prepared[-1].text.texts] == [text.strip() for text in completions]
        return [float(len(text)) for text in completions]

    made = trainer(tmp_path, credit=credit(condition), roles={"reward_model": reward}, num_steps=2)
    made.train()
    assert len(condition.prepared) == 2
    for rollout in condition.called:
        assert any(rollout is prepared for prepared in condition.prepared)
        assert rollout.entropies is not None
        assert rollout.text is not None
        again = with_text(replace(rollout, text=None), made.tokenizer).text
        assert again is not None
        assert torch.equal(again.spans, rollout.text.spans)


def entropies_by_hand(made: PPOTrainer, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample with entropies, and compute them again from the policy's logits at each place."""
    prompts = made.prompts.batch(range(5))
    uniforms = torch.rand(5, sampling.max_new_tokens, generator=torch.Generator().manual_seed(0))
    policy: Any = made.policy.module
    found = sample(policy, prompts, sampling, uniforms, pad_id=0, with_entropies=True)
    plain = sample(policy, prompts, sampling, uniforms, pad_id=0)
    assert plain.entropies is None
    assert torch.equal(plain.response_ids, found.response_ids)
    assert torch.equal(plain.logprobs, found.logprobs)
    assert found.entropies is not None
    wanted = torch.zeros(found.entropies.shape)
    for row in range(5):
        prompt = prompts.prompt_ids[row][prompts.prompt_mask[row]]
        for place in range(int(found.response_mask[row].sum())):
            ids = torch.cat([prompt, found.response_ids[row, :place]])
            logits = policy.model(input_ids=ids[None]).logits[0, -1].double() / sampling.temperature
            if place < sampling.min_new_tokens:
                logits[list(policy.eos_ids)] = -torch.inf
            if sampling.top_k:
                logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
            chances = logits.softmax(-1)
            wanted[row, place] = -(chances * chances.clamp(min=1e-300).log()).sum()
    return found.entropies, wanted


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=6), Sampling(max_new_tokens=6, temperature=0.5, top_k=4)])
def test_entropies_are_those_of_the_distribution_that_was_sampled(sampling: Sampling, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        found, wanted = entropies_by_hand(made, replace(sampling, min_new_tokens=2))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert found.max() > 0.5
