"""`make sandbox`, on a PATH of our own: what it finds there, and what it does where something is missing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """What `make sandbox` may call; apt-get and sudo write down that they were called."""
    for name in ("sh", "make", "bwrap"):
        (tmp_path / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    write(tmp_path / "apt-get", f'echo "apt-get $*" >> {tmp_path}/called')
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(tools: Path, *, user: int, python: str = sys.executable) -> tuple[int, str, str]:
    """Run it as who `id` says; return its status, what it printed, and what it called."""
    write(tools / "id", f"echo {user}")
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), "sandbox", f"PYTHON={python}"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    called = tools / "called"
    return done.returncode, done.stdout + done.stderr, called.read_text() if called.exists() else ""


def test_where_all_is_there_an_ordinary_user_needs_neither_sbin_nor_sudo(tools: Path) -> None:
    assert make(tools, user=1000) == (0, "", "")


@pytest.mark.parametrize("missing", ["bwrap", "libseccomp2"])
def test_without_rights_one_line_says_what_to_install(missing: str, tools: Path) -> None:
    if missing == "bwrap":
        (tools / "bwrap").unlink()
    write(tools / "without", "exit 1")  # a Python that does not find the library
    code, told, called = make(tools, user=1000, python="without" if missing == "libseccomp2" else sys.executable)
    first, *rest = told.splitlines()
    assert first.endswith("is missing: let root run apt-get install bubblewrap libseccomp2")
    assert [line.partition(":")[0] for line in rest] == ["make"]  # its own, of the status
    assert (code, called) == (2, "")


@pytest.mark.parametrize("user", [0, 1000])
def test_with_rights_what_is_missing_is_installed(user: int, tools: Path) -> None:
    (tools / "bwrap").unlink()
    if user:
        write(tools / "sudo", '"$@"')
    code, _, called = make(tools, user=user)
    assert (code, called) == (0, "apt-get update -qq\napt-get install -y -qq bubblewrap libseccomp2\n")
