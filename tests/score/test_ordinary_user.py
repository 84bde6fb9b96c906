"""Boxes as who is not root makes them: in a process of user 65534, for the suite itself may run as root."""

import json
import os

import pytest

from conformance import EVIL
from ordinary_user import NOBODY, ROOT, as_ordinary_user

BWRAP_REMEDY = "bubblewrap may not make namespaces here: load its AppArmor profile"


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
