"""Processes that parse: they come back when they die, and never stay behind."""

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import parsers
from apportion.parsing.parsers import ParserUnavailable
from apportion.parsing.pool import ParserPool


@pytest.fixture
def pool() -> Iterator[ParserPool]:
    made = ParserPool(parsers.moody, workers=2, patience=20)
    yield made
    made.close()


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "apportion.parsing.worker" in p.cmdline()]


def test_trees_come_back_for_the_texts_that_were_asked_for(pool: ParserPool) -> None:
    texts = [f"one two {number}" for number in range(100)]
    pool.submit(texts[:60])
    found = pool.collect(texts + texts[:3])
    assert found == {text: tuple(parsers.pairs(text)) for text in texts}
    assert len(children()) == 2


def test_a_text_that_cannot_be_parsed_has_no_trees_and_harms_no_other(pool: ParserPool) -> None:
    found = pool.collect(["good text", "fail here", "nonsense here", "more text"])
    assert found["fail here"] is found["nonsense here"] is None
    assert found["good text"] == tuple(parsers.pairs("good text"))
    assert found["more text"] == tuple(parsers.pairs("more text"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_parser_that_answers_too_few_stops_nothing(workers: int) -> None:
    made = ParserPool(parsers.Forgetful(), workers=workers)
    texts = ["one two", "three four", "five six"]
    assert made.collect(texts) == {text: tuple(parsers.pairs(text)) for text in texts}  # each is asked for alone
    made.close()


def test_a_worker_that_dies_is_started_again_and_told_of(pool: ParserPool) -> None:
    with pytest.warns(UserWarning, match="died or hung under 'die now', which falls back .* lower .*`workers`, or fr"):
        found = pool.collect(["good text", "die now", "more text", "yet more text"])
    assert found["die now"] is None
    assert found["more text"] == tuple(parsers.pairs("more text"))
    assert pool.collect(["and on"]) == {"and on": tuple(parsers.pairs("and on"))}


def test_workers_that_are_killed_from_outside_are_replaced(pool: ParserPool) -> None:
    pool.collect(["one two"])
    for child in children():
        child.kill()
    texts = [f"text {number}" for number in range(8)]
    assert pool.collect(texts) == {text: tuple(parsers.pairs(text)) for text in texts}


def test_a_worker_that_hangs_is_ended() -> None:
    pool = ParserPool(parsers.Slow(seconds=60), workers=1, patience=0.3)
    with pytest.warns(UserWarning, match="died or hung under 'a text'"):
        assert pool.collect(["a text"]) == {"a text": None}
    pool.close()


def test_a_text_that_hangs_holds_up_those_beside_it_no_longer_than_itself() -> None:
    pool = ParserPool(parsers.hanging, workers=1, patience=1.0)
    texts = [*(f"text {number}" for number in range(20)), "hang"]
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="died or hung under 'hang'"):
        found = pool.collect(texts)
    assert time.monotonic() - begun < 12  # the patience for all together, and for the last alone; not for each
    assert found == {text: tuple(parsers.pairs(text)) for text in texts[:-1]} | {"hang": None}
    pool.close()


def test_texts_that_are_slow_one_and_all_are_parsed_fewer_at_once() -> None:
    """Otherwise each job would fail as a whole, and be done again text by text."""
    pool = ParserPool(parsers.Slow(seconds=0.15), workers=1, patience=1.0)
    times = []
    for turn in range(3):
        texts = [f"{turn} {number}" for number in range(12)]
        times.append(-time.monotonic())
        assert pool.collect(texts) == {text: tuple(parsers.pairs(text)) for text in texts}
        times[-1] += time.monotonic()
    assert min(times[1:]) < times[0] - 0.5  # the first time all was begun together and done again, for its patience
    pool.close()


def test_each_text_is_parsed_once_and_the_latest_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    pool = ParserPool(parsers.number_of_process, workers=2, cache_size=3)
    pool.submit(["a", "b"])
    pool.collect(["a", "b", "a", "c"])
    pool.collect(["b", "a"])
    pool.collect(["d"])  # drops c, which was asked for longest ago
    pool.collect(["a", "b", "d"])
    pool.collect(["c"])
    pool.close()
    asked = [line.split()[1] for line in (tmp_path / "asked").read_text().splitlines()]
    assert sorted(asked) == ["a", "b", "c", "c", "d"]
    assert str(os.getpid()) not in (tmp_path / "asked").read_text()


def test_parsing_goes_on_while_this_process_works() -> None:
    pool = ParserPool(parsers.Slow(seconds=0.5), workers=1)
    pool.open()
    pool.submit(["a text"])
    time.sleep(1)
    begin = time.perf_counter()
    pool.collect(["a text"])
    assert time.perf_counter() - begin < 0.25
    pool.close()


def test_close_ends_the_processes_and_the_pool_can_go_on() -> None:
    pool = ParserPool(parsers.Slow(seconds=100), workers=2)
    pool.submit([f"text {number}" for number in range(80)])
    assert len(children()) == 2
    begin = time.perf_counter()
    pool.close()
    pool.close()
    assert not children()
    assert time.perf_counter() - begin < 4  # what is being parsed, and what is left, is not waited for
    pool.parser = parsers.pairs
    assert pool.collect(["text 0"]) == {"text 0": tuple(parsers.pairs("text 0"))}
    pool.close()


def test_a_pool_that_is_dropped_ends_its_processes() -> None:
    pool = ParserPool(parsers.pairs, workers=1)
    pool.collect(["a text"])
    (child,) = children()
    del pool
    assert not psutil.wait_procs([child], timeout=10)[1]


def test_no_process_stays_behind_one_that_is_killed(tmp_path: Path) -> None:
    """Killed by SIGKILL, a process can clean up nothing itself."""
    code = """
import os, sys, time
import parsers
from apportion.parsing.pool import ParserPool
pool = ParserPool(parsers.Slow(seconds=1), workers=2)
pool.submit([f"text {number}" for number in range(100)])
print("started", flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_copy_of_a_pool_is_one_of_the_same_settings() -> None:
    pool = ParserPool(parsers.pairs, workers=1, cache_size=7, patience=3.0)
    pool.collect(["a text"])
    other = copy.deepcopy(pool)
    assert (other.parser, other.workers, other.cache_size, other.patience) == (parsers.pairs, 1, 7, 3.0)
    pool.close()


@pytest.mark.parametrize(
    ("parser", "message"),
    [
        (lambda text: parsers.pairs(text), r"cannot be sent to a worker process .* define it at the top of a module"),
        (parsers.Dying(), "the parser cannot be loaded: its process ended with code 3 while it was loaded"),
    ],
)
def test_a_parser_that_workers_cannot_have_is_refused(parser, message: str) -> None:
    pool = ParserPool(parser, workers=2)
    with pytest.raises(ParserUnavailable, match=message):
        pool.open()
    assert not children()


def test_without_workers_texts_are_parsed_here() -> None:
    pool = ParserPool(parsers.moody, workers=0)
    pool.submit(["one two"])
    assert pool.collect(["one two", "fail"]) == {"one two": tuple(parsers.pairs("one two")), "fail": None}
    assert not children()
    pool.close()
