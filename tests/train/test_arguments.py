"""Settings out of range are refused by name, and written so that the command line reads them."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from apportion import Attention, CreditConfig, Mixture, PPOArguments, PPOConfig, RandomizedNgram, Shuffled, Uniform
from apportion.train.arguments import to_yaml


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("batch_size", 0),
        ("max_prompt_length", 0),
        ("save_total_limit", 0),
        ("eval_steps", -1),
        ("eval_batch_size", 0),
        ("save_steps", -1),
        ("warmup_steps", -1),
        ("num_logged_samples", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("critic_learning_rate", -1.0),
        ("warmup_ratio", 1.0),
        ("warmup_ratio", -0.1),
    ],
)
def test_a_number_out_of_range_is_refused_by_name_and_value(name: str, value: float) -> None:
    changes: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; choose"):
        PPOArguments(**changes)


def test_warm_up_is_given_in_updates_or_as_a_part_of_the_run() -> None:
    assert PPOArguments(num_steps=200, warmup_steps=7).warmup == 7
    assert PPOArguments(num_steps=200, warmup_ratio=0.05).warmup == 10
    with pytest.raises(ValueError, match=r"warmup_steps is 7 and warmup_ratio 0.05; give one of them"):
        PPOArguments(warmup_steps=7, warmup_ratio=0.05)


def test_settings_are_written_as_the_command_line_reads_them() -> None:
    credit = CreditConfig(termination=RandomizedNgram(lengths=(2, 3)), redistribution=Shuffled(Attention(beta=0.5)))
    found = yaml.safe_load(to_yaml(PPOArguments(seed=3, credit=credit, ppo=PPOConfig(ratio="macro"))))
    assert found["seed"] == 3
    assert found["ppo"]["ratio"] == "macro"
    assert found["credit"]["kl_coef"] == 0.05
    assert found["credit"]["termination"] == {
        "class_path": "apportion.credit.termination.RandomizedNgram",
        "init_args": {"lengths": [2, 3], "repeats": 3, "seed": 0},
    }
    inner = found["credit"]["redistribution"]["init_args"]["inner"]
    assert inner == {
        "class_path": "apportion.credit.attention.Attention",
        "init_args": {"beta": 0.5, "layer": None, "heads": None, "row": "read"},
    }


def evenly(rollout: Any, scores: Any, **_: Any) -> Any:
    """A user's own redistribution."""
    return rollout.response_mask * scores.scores[:, None]


def test_a_mixture_is_written_as_a_list_of_redistributions_and_weights() -> None:
    mixture = Mixture.of({Uniform(beta=0.5): 0.25, evenly: 0.75})
    written = yaml.safe_load(to_yaml(PPOArguments(credit=CreditConfig(redistribution=mixture))))
    found = written["credit"]["redistribution"]
    assert found["class_path"] == "apportion.credit.mixture.Mixture"
    uniform = {"class_path": "apportion.credit.redistribution.Uniform", "init_args": {"beta": 0.5}}
    own = f"{__name__}.evenly"
    assert found["init_args"]["parts"] == [
        {"redistribution": uniform, "weight": 0.25},
        {"redistribution": own, "weight": 0.75},
    ]


def test_other_settings_give_other_text_and_the_same_the_same() -> None:
    assert to_yaml(PPOArguments()) == to_yaml(PPOArguments())
    assert to_yaml(PPOArguments()) != to_yaml(PPOArguments(credit=CreditConfig(kl_coef=0.1)))


@dataclass(frozen=True)
class SentenceEnd:
    """A user's own condition."""

    mark: int = 7

    def __call__(self, rollout: Any) -> Any:
        return rollout.response_ids == self.mark


def test_a_users_own_class_is_written_by_its_path() -> None:
    found = yaml.safe_load(to_yaml(PPOArguments(credit=CreditConfig(termination=SentenceEnd(mark=9)))))
    written = found["credit"]["termination"]
    assert written["class_path"].endswith("SentenceEnd")
    assert written["init_args"] == {"mark": 9}
