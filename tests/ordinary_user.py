"""A command as who has no rights at all runs it, for the suite itself may run as root."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOBODY = 65534


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
