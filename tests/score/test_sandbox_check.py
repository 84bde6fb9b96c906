"""`apportion sandbox check` sees what holds, what does not, and what it could not see."""

import os
import sys
import tempfile
from dataclasses import replace

import pytest

from apportion.score.sandbox import PROMISES, Bubblewrap, Limits, SandboxError, UnsafeSubprocess
from apportion.score.sandbox_check import findings
from apportion.score.seccomp import filter_program
from command_line import apportion


def states(backend: Bubblewrap | UnsafeSubprocess) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings(backend)}


class Leaky(Bubblewrap):
    """A box with a hole."""

    def command(self, limits: Limits, info: int) -> list[str]:
        command = super().command(limits, info)
        place = command.index("--remount-ro")
        return [*command[:place], *self.hole(), *command[place:]]

    def hole(self) -> list[str]:
        return ["--ro-bind", "/etc", "/etc"]


class Writable(Leaky):
    def hole(self) -> list[str]:
        return ["--bind", tempfile.gettempdir(), tempfile.gettempdir()]


class SharesVariables(Leaky):
    def hole(self) -> list[str]:
        return [word for name, value in os.environ.items() for word in ("--setenv", name, value)]


class SharesProcesses(Bubblewrap):
    """Without a namespace of processes, and as the user itself."""

    def command(self, limits: Limits, info: int) -> list[str]:
        words = super().command(limits, info)
        return [word for word in words if word not in ("--unshare-pid", "--as-pid-1")]

    def user(self) -> None:
        return None


def test_every_promise_is_looked_at() -> None:
    found = findings(Bubblewrap())
    assert {finding.promise for finding in found} - {None} == PROMISES
    assert [finding.name for finding in found if finding.state != "holds"] == []


@pytest.mark.parametrize(
    ("backend", "broken"),
    [
        (Leaky, {"reading files"}),
        (Writable, {"reading files", "writing outside /tmp", "disk"}),
        (SharesVariables, {"environment"}),
        (SharesProcesses, {"signals to others", "nothing is left", "processes"}),
    ],
)
def test_a_hole_is_seen_and_nothing_else_is(backend: type[Bubblewrap], broken: set[str]) -> None:
    found = states(backend())
    if os.geteuid() != 0:
        broken = broken - {"processes"}  # which is limited for every other user
    assert {name for name, state in found.items() if state == "does not hold"} == broken
    assert {name for name, state in found.items() if state == "unknown"} == set()


def test_a_try_that_does_not_come_about_is_unknown() -> None:
    assert states(replace(Bubblewrap(), packages=False))["numpy runs"] == "unknown"


def test_without_a_box_it_says_plainly_what_does_not_hold() -> None:
    with pytest.warns(UserWarning, match="unsafe-subprocess"):
        shown = apportion("sandbox", "check", "--backend", "unsafe-subprocess")
    assert shown.code == 2
    for name in ("reading files", "environment", "writing outside /tmp", "signals to others", "nothing is left"):
        assert name in shown.err
    assert "does not hold: " in shown.err
    assert "choose bubblewrap" in shown.err
    with pytest.warns(UserWarning, match="unsafe-subprocess"):
        backend = UnsafeSubprocess()
    found = findings(backend)
    assert not [finding.name for finding in found if finding.promise in backend.promises() and finding.state != "holds"]


def test_where_no_box_can_be_made_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match=r"bubblewrap is not installed.*apt-get install bubblewrap"):
        findings(Bubblewrap())


def test_without_the_filter_s_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    filter_program.cache_clear()
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    shown = apportion("sandbox", "check")
    assert shown.code == 2
    assert "pip install 'apportion[programs]'" in shown.err
