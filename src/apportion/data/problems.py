"""Programming problems: what is asked, and what tests the answer."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Tests:
    """What a program is tested by: inputs and outputs, calls and their values, or source that asserts.

    Attributes:
        inputs: Text on standard input; or the arguments of each call, where there is a `function`.
        outputs: Text on standard output; or what each call returns.
        function: Function, or method of a class `Solution`, that is called (APPS's `fn_name`); None for a script.
        checks: Sources of tests that name what the program defines, instead of inputs and outputs.
        setup: Source that runs before each check.
        prelude: Source that runs before the program, in its place: imports that the task promises.

    Raises:
        ValueError: If there is no test, or inputs and outputs differ in number.
    """

    __test__ = False  # not one of pytest's

    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    function: str | None = None
    checks: Sequence[str] = ()
    setup: str = ""
    prelude: str = ""

    def __post_init__(self) -> None:
        """Refuse what tests nothing."""
        for name in ("inputs", "outputs", "checks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.inputs) != len(self.outputs):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs are given; give as many")
        if bool(self.checks) == bool(self.inputs):
            raise ValueError("give inputs with outputs, or checks")

    def __len__(self) -> int:
        """Number of tests."""
        return len(self.checks or self.inputs)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A programming problem.

    Attributes:
        task_id: Its name in its benchmark; no two problems share one.
        prompt: What a model is given.
        tests: What its answer is tested by.
        difficulty: Such as `introductory`; empty where the benchmark has none.
        head: Source that an answer continues, such as a signature with its description; empty where an answer is a
            whole program.
        solutions: Answers that are right, in the form of a completion of the prompt.
    """

    task_id: str
    prompt: str
    tests: Tests
    difficulty: str = ""
    head: str = ""
    solutions: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Write all but the prompt and the solutions, for a column that a reward reads."""
        content = {name: value for name, value in asdict(self).items() if name not in ("prompt", "solutions")}
        for name in ("inputs", "outputs"):
            content["tests"][name] = _packed(content["tests"][name])
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> "Problem":
        """Read what `to_json` wrote.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            content = json.loads(text, object_hook=_unpacked)
            return cls(**content | {"prompt": "", "tests": Tests(**content["tests"])})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            shown = text if isinstance(text, str) and len(text) < 60 else f"{str(text)[:57]}..."
            raise ValueError(f"{shown!r} is no problem ({error}); give what Problem.to_json writes") from error


ITEMS, HEX = "items of a mapping", "integer in base 16"
LARGE = 2**63
"""From here on integers are written in base 16: Python refuses to write thousands of decimal digits."""


def _packed(value: Any) -> Any:
    """Turn a value into one that JSON keeps: keys of its mappings may be of any kind, integers of any length."""
    if isinstance(value, dict):
        return {ITEMS: [[_packed(key), _packed(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(item) for item in value]
    if isinstance(value, int) and not -LARGE < value < LARGE:
        return {HEX: hex(value)}
    return value


def _unpacked(content: dict[str, Any]) -> Any:
    """Undo `_packed`, for each object that JSON has read."""
    if content.keys() == {ITEMS}:
        return dict(content[ITEMS])
    return int(content[HEX], 16) if content.keys() == {HEX} else content
