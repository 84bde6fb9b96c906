"""From completions to programs, and back from lines of a program to characters of a completion."""

import pytest

from apportion.data.answers import answer

Q = '"""'
HEAD = 'def f(x):\n    """one more"""\n'


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Sure!\n```python\nx = 1\n```\nDone. ```\ny\n```", "x = 1\n"),
        ("```\nx = 1\n```\n```\ny = 2\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("  ```python\nx = 1\n  ```", "x = 1\n"),
        ("a = 'no ``` fence'\n", "a = 'no ``` fence'\n"),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("", ""),
        ("def f(x):\n    return x\n```\n\nThis returns x.\n", "def f(x):\n    return x\n"),
        ("def f(x):\n    return x\n```", "def f(x):\n    return x\n"),
        ("x = 1\nprint(x)\n\nOutput:\n```\n1\n```", "x = 1\nprint(x)\n\nOutput:\n"),
        ("# Solution\n```\nx = 1\n```", "x = 1\n"),
        ("Here you are, f(x) as you asked:\n```\nx = 1", "x = 1"),
        (f"def f():\n    {Q}\n    ```\n    f(1)\n    ```\n    {Q}\n",) * 2,
        (f"```python\nx = {Q}\n```\n{Q}\n```", f"x = {Q}\n```\n{Q}\n"),
        (f"```python\nx = 1  # {Q}\n```\nBye.", f"x = 1  # {Q}\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("````python\nx = 1\n```\n````", "x = 1\n```\n"),
        ("~~~py\nx = 1\n~~~\n", "x = 1\n"),
    ],
)
def test_the_first_block_or_the_whole_text_is_the_program(completion: str, program: str) -> None:
    assert answer(completion).program == program


def test_a_completion_goes_on_behind_the_head() -> None:
    assert answer("    return x + 1\n", HEAD).program == HEAD + "    return x + 1\n"


@pytest.mark.parametrize("end", ["```", "```\n\nIt returns x.\n", "```\n\nExample:\n```python\nf(1)\n```\n"])
def test_a_body_ends_at_a_fence(end: str) -> None:
    assert answer("    return x + 1\n" + end, HEAD).program == HEAD + "    return x + 1\n"


def test_a_function_that_is_written_again_replaces_the_head() -> None:
    names: dict = {}
    exec(answer("Here:\n```python\ndef f(x):\n    return x + 1\n```", HEAD).program, names)
    assert names["f"](1) == 2


@pytest.mark.parametrize(
    ("completion", "line", "wanted"),
    [
        ("    y = x\n    return y\n", 3, "y = x"),
        ("    y = x\n    return y\n", 4, "return y"),
        ("    y = x\n    return y\n", 1, None),  # the head's
        ("    y = x\n    return y\n", 5, None),  # blank
        ("    y = x\n    return y\n", 9, None),
        ("Well:\n```python\n    y = x\n    return y\n```\n", 4, "return y"),
        ("    ä = 'ü'\n    return ä", 4, "return ä"),
        ("- So:\n  ```python\n  def f(x):\n      return y\n  ```", 4, "return y"),
    ],
)
def test_a_line_of_the_program_is_found_in_the_completion(completion: str, line: int, wanted: str | None) -> None:
    found = answer(completion, HEAD).characters(line)
    assert (found and completion[found[0] : found[1]]) == wanted


def test_a_line_that_the_model_finished_counts_as_far_as_it_wrote_it() -> None:
    completion = "x + 1\n"
    found = answer(completion, "def f(x):\n    return ").characters(2)
    assert found == (0, 5)
