"""Boxes as who is not root makes them: in a process of user 65534, for the suite itself may run as root."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import EVIL

ROOT = Path(__file__).parent.parent.parent
NOBODY = 65534
BWRAP_REMEDY = "bubblewrap may not make namespaces here: load its AppArmor profile"


def hidden_by(path: Path) -> Path | None:
    """Find the outermost folder above a path that an ordinary user may not enter."""
    return next((folder for folder in [*reversed(path.parents), path] if not folder.stat().st_mode & 0o001), None)


def view() -> list[str]:
    """Where Python or the checkout lie in a folder of root's own, show them, and nothing else of it, to the user."""
    needed = {Path(place).resolve() for place in (sys.base_prefix, sys.prefix, ROOT, ROOT / "src")}
    hidden = {path: folder for path in needed if (folder := hidden_by(path))}
    if not hidden:
        return []
    words = ["bwrap", "--dev-bind", "/", "/"]
    for folder in sorted(set(hidden.values())):
        words += ["--perms", "0755", "--tmpfs", str(folder)]
    for path, folder in hidden.items():
        between = [parent for parent in reversed(path.parents) if folder in parent.parents]
        words += [word for parent in between for word in ("--perms", "0755", "--dir", str(parent))]
        words += ["--ro-bind", str(path), str(path)]
    return words


def as_ordinary_user(*command: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command without any rights, after one that prepares it."""
    drop = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all")
    places = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests")))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": places, "HOME": "/nonexistent", "CANARY_TOKEN": "a secret"}
    return subprocess.run(
        [*view(), *drop, *before, sys.executable, *command],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; the suite itself is one")


def test_the_user_has_no_rights() -> None:
    code = "import os; print(os.getresuid(), os.getgroups(), [l for l in open('/proc/self/status') if 'CapEff' in l])"
    shown = as_ordinary_user("-c", code)
    assert shown.stdout == f"({NOBODY}, {NOBODY}, {NOBODY}) [] ['CapEff:\\t{0:016x}\\n']\n", shown.stderr


@pytest.mark.slow
def test_an_ordinary_user_s_boxes_hold_what_root_s_hold() -> None:
    found = as_ordinary_user(str(ROOT / "tests" / "conformance.py"))
    if found.returncode and BWRAP_REMEDY in found.stderr:
        pytest.skip("this machine allows user 65534 no user namespaces, and the error says what to do")
    assert json.loads(found.stdout) == {"as_root": False, "tried": len(EVIL), "wrong": []}, found.stderr


def test_an_ordinary_user_is_told_what_holds() -> None:
    found = as_ordinary_user("-m", "apportion", "sandbox", "check")
    if found.returncode and BWRAP_REMEDY in found.stderr:
        pytest.skip("this machine allows user 65534 no user namespaces, and the error says what to do")
    assert found.returncode == 0, found.stderr
    assert "in a user" in found.stdout
    assert "processes seen while a box ran" in found.stdout


def test_an_ordinary_user_without_namespaces_is_told_the_remedy() -> None:
    """Where user namespaces may be made, one is made in which no more of them may."""
    refuse = ("unshare", "--user", "--map-root-user", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; "$@"')
    found = as_ordinary_user("-m", "apportion", "sandbox", "check", before=(*refuse, "sh"))
    assert found.returncode == 2
    assert found.stderr.startswith("apportion sandbox: error: no box could be made: bwrap: ")
    assert BWRAP_REMEDY in found.stderr


def test_who_is_called_root_in_a_user_namespace_has_boxes_in_another_one() -> None:
    code = (
        "import os\nfrom apportion.data.problems import Tests\nfrom apportion.score.programs import run_tests\n"
        "from apportion.score.sandbox import Bubblewrap\n"
        "print(os.geteuid(), Bubblewrap().as_root, run_tests('print(1)', Tests(inputs=[''], outputs=['1'])).passed)"
    )
    found = as_ordinary_user("-c", code, before=("unshare", "--user", "--map-root-user"))
    if found.returncode and (BWRAP_REMEDY in found.stderr or "unshare: " in found.stderr):
        pytest.skip("this machine allows user 65534 no user namespaces, and the error says what to do")
    assert found.stdout == "0 False 1\n", found.stderr
