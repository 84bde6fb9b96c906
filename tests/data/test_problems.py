"""Problems as data: what is kept in a column."""

import json

import pytest

from apportion import Problem, Tests

HEAD = 'def f(x):\n    """one more"""\n'


def test_problems_survive_a_column() -> None:
    tests = Tests(inputs=[[1, [2.5, None]]], outputs=[{"a": [True]}], function="f", prelude="import math")
    problem = Problem(task_id="t", prompt="p", tests=tests, difficulty="easy", head=HEAD, solutions=("s",))
    same = Problem.from_json(problem.to_json())
    assert same.tests == tests
    assert (same.task_id, same.difficulty, same.head) == ("t", "easy", HEAD)
    assert (same.prompt, same.solutions) == ("", ())


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"task_id": "a"}), json.dumps({"tests": {}, "x": 1})])
def test_what_is_no_problem_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no problem|give inputs with outputs"):
        Problem.from_json(text)
