"""The type checker that jaxtyping's import hook lays over every function of apportion while tests run."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int is a float here, as it is for pyright. Self cannot be told where methods are decorated one by one.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: Any})))
