"""A bar in a terminal, silence elsewhere, and seconds of each stage."""

import time
from io import StringIO

import pytest
from rich.console import Console

import apportion.train.progress
from apportion.train.progress import Stopwatch, progress

METRICS = {"score/mean": 1.5, "rollout/kl_sequence": 0.25, "time/generate": 0.3, "time/update": 0.2}


def shown(terminal: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    output = StringIO()
    console = Console(file=output, force_terminal=terminal, width=160)
    monkeypatch.setattr(apportion.train.progress, "Console", lambda **_: console)
    with progress(10, 3, wanted) as show:
        show(metrics=METRICS)
    return output.getvalue()


def test_a_terminal_sees_updates_rate_score_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(True, True, monkeypatch)
    for part in ("4/10", "2 updates/s", "left", "score 1.5", "kl 0.25"):
        assert part in text


@pytest.mark.parametrize(("terminal", "wanted"), [(False, True), (True, False)])
def test_other_outputs_and_other_processes_see_nothing(
    terminal: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(terminal, wanted, monkeypatch).strip() == ""


def test_a_stopwatch_tells_the_seconds_of_each_stage() -> None:
    watch = Stopwatch()
    for name in ("time/score", "time/update"):
        with watch(name):
            time.sleep(0.01)
    assert list(watch.times) == ["time/score", "time/update"]
    assert all(0.009 < seconds < 5 for seconds in watch.times.values())
