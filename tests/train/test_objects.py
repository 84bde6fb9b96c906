"""Objects of a user's own are told apart by what they were made of, and none of their code is run for it."""

import operator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apportion import CreditConfig, FixedNgram, Mixture, Uniform
from apportion.train.objects import made_of, own_objects


class Plain:
    """Of a class without any helper."""

    def __init__(self, part: Any, *, table: Any = None, **more: Any) -> None:
        self.part, self.table, self.more = part, table, more
        self.read = 0

    def __call__(self, *given: Any, **_: Any) -> Any:
        return self.part * given[1].scores

    def pay(self, *given: Any, **_: Any) -> Any:
        return self(*given)


def evenly(*given: Any, **_: Any) -> Any:
    return given[1].scores


class Lazy:
    """Whose attributes must not be read."""

    def __init__(self, model: str, broken: int = 0) -> None:
        self.name = f"{model} {broken}"

    def __call__(self, *_: Any) -> Any:
        raise AssertionError

    @cached_property
    def model(self) -> Any:
        raise AssertionError

    @property
    def broken(self) -> Any:
        raise KeyError


class Rude:
    """Whose description fails."""

    __slots__ = ()

    def __call__(self, *_: Any) -> Any:
        raise AssertionError

    def __repr__(self) -> str:
        raise KeyError("no")


def holding_itself() -> Plain:
    own = Plain(0.9)
    own.table = [own]
    return own


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Plain(x),
        lambda x: Plain(np.float64(x)),
        lambda x: Plain(np.full(3, x)),
        lambda x: Plain(torch.tensor([x])),
        lambda x: Plain(torch.tensor([x], dtype=torch.bfloat16)),
        lambda x: Plain([1, {"a": (x, None)}]),
        lambda x: Plain(Path(str(x))),
        lambda x: Plain(Plain(x)),
        lambda x: Plain(1, table={(1, 2): 3}, x=x),
        lambda x: Plain(x, table=Rude()),
        lambda x: Plain(partial(evenly, x=x)),
        lambda x: Plain({x, "y"}),
        lambda x: Plain(torch.float32 if x > 0.5 else torch.float64),
        lambda x: Plain(x).pay,
        lambda x: partial(evenly, x=x),
        lambda x: partial(Plain(x), y=1),
    ],
)
def test_objects_are_told_apart_by_what_they_were_made_of(make: Any) -> None:
    assert made_of(make(0.9)) == made_of(make(0.9))
    assert made_of(make(0.9)) != made_of(make(0.1))


def test_nothing_of_an_object_is_run_or_refused() -> None:
    for odd in (
        Rude(),
        Lazy("a"),
        holding_itself(),
        Plain(Rude()),
        operator.itemgetter(1),
        Plain(operator.itemgetter(1)),
    ):
        assert made_of(odd) == made_of(odd)
    own = Plain(0.9)
    before = made_of(own)
    own.read += 1  # what is no parameter, such as a counter
    assert made_of(own) == before
    assert made_of(Plain(0.9)) != made_of(Lazy("a"))


def test_only_what_the_settings_do_not_hold_is_listed() -> None:
    @dataclass(frozen=True)
    class Setting:
        n: int = 1

        def __call__(self, rollout: Any) -> Any: ...

    own, method = Plain(1), Plain(2).pay
    mixture = Mixture.of({Uniform(): 0.25, own: 0.25, method: 0.25, evenly: 0.25})
    assert [*own_objects(CreditConfig(redistribution=mixture, termination=Setting()))] == [own, method]
    assert not [*own_objects(CreditConfig(termination=FixedNgram(), redistribution=evenly))]
