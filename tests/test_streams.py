"""Random numbers are a function of seed, purpose and time."""

import torch

from apportion.streams import generator


def numbers(*arguments: int | str) -> list[float]:
    seed, purpose, when = arguments
    assert isinstance(seed, int)
    assert isinstance(purpose, str)
    assert isinstance(when, int)
    return torch.rand(4, generator=generator(seed, purpose, when)).tolist()


def test_the_same_arguments_give_the_same_numbers_and_any_other_gives_others() -> None:
    streams = [numbers(0, "sample", 0), numbers(1, "sample", 0), numbers(0, "prompts", 0), numbers(0, "sample", 1)]
    assert numbers(0, "sample", 0) == streams[0]
    assert len({tuple(stream) for stream in streams}) == 4


def test_no_two_streams_of_a_long_run_are_alike() -> None:
    first = {numbers(seed, "sample", when)[0] for seed in range(5) for when in range(400)}
    assert len(first) > 1990  # of 2,000 floats of 24 bits


def test_a_stream_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    numbers(0, "sample", 0)
    assert torch.equal(torch.get_rng_state(), before)
