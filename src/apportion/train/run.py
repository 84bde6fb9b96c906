"""The run folder: what a training run writes, in an order that survives a kill at any moment.

    config.yaml              the resolved configuration; the same text again repeats the run
    metrics.jsonl            one strict JSON object an update; what is not finite is written as null and read as NaN
    samples.jsonl            a few evaluation prompts with their responses, each evaluation
    checkpoints/step-000060  written under a temporary name, synced, then renamed: a folder of this name is complete
    model/, report/          the final policy and the report, written by others

A resumed run opens the folder, loads `latest_checkpoint()` and calls `truncate_after` with its step (-1 if there is
none), which takes back the lines that were logged after it; the run writes them again. Nothing is pickled. With several
processes only the main one may open a `Run`; the others read checkpoints by the functions of this module.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, METRICS, SAMPLES, CHECKPOINTS = "config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints"
STATE = "state.json"
TEMPORARY, LOCK = ".tmp-", ".lock"
# They say where a run writes and how it was started, not what it computes.
PLACE_KEYS = frozenset({"output_dir", "resume"})


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        step: Updates done when it was written.
        path: Its folder; models that a callback wrote lie here as Hugging Face folders.
    """

    step: int
    path: Path

    def load(self) -> tuple[dict[str, dict[str, Tensor]], Any]:
        """Return the tensors of each safetensors file beside state.json, by file name, and the state.

        Raises:
            ValueError: If a file is damaged, which a kill cannot have done, but a full disk or a loss of power may.
        """
        try:
            tensors = {file.stem: load_file(file) for file in sorted(self.path.glob("*.safetensors"))}
            return tensors, json.loads((self.path / STATE).read_text(encoding="utf-8"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"checkpoint {self.path} is damaged ({error}); remove it to resume from the one before"
            ) from error


class Run:
    """A run folder open for writing; `Run.open` makes one."""

    def __init__(self, folder: Path, lock: FileLock, *, keep_checkpoints: int) -> None:
        """Hold a folder that `open` has checked, and its lock as long as this is there."""
        self.folder, self.lock = folder, lock
        self.keep_checkpoints = keep_checkpoints
        self._last_step = -1

    @classmethod
    def open(cls, folder: str | Path, config: str, *, resume: bool = False, keep_checkpoints: int = 2) -> Run:
        """Create the folder of a new run, or open that of a killed one.

        Args:
            folder: Made with its parents if it is not there.
            config: The resolved configuration as YAML text, written to config.yaml.
            resume: Continue what the folder holds. A folder that is absent or empty starts a new run, so that a job
                that may be preempted can always be started with it.
            keep_checkpoints: Newest checkpoints kept, at least 1.

        Raises:
            ValueError: If the folder cannot be written; is being written by another process; is not empty and `resume`
                is off; is not a run folder; or was made with another configuration (`output_dir` and `resume` aside).
        """
        folder = Path(folder)
        if keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints is {keep_checkpoints}; at least 1 must be kept to resume from")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_contents(folder, config, resume=resume)
            lock = _locked(folder)
            (folder / CHECKPOINTS).mkdir(exist_ok=True)
            _remove_temporary(folder)
            _remove_temporary(folder / CHECKPOINTS)
            if not (folder / CONFIG).exists():
                write_atomically(folder / CONFIG, config)
        except OSError as error:
            raise ValueError(f"run folder {folder} cannot be written ({error.strerror}); choose another") from error
        run = cls(folder, lock, keep_checkpoints=keep_checkpoints)
        run._last_step = max((int(record["step"]) for record in read_records(folder / METRICS)), default=-1)
        return run

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, on the disk when this returns.

        Args:
            step: Updates done; larger than that of the line before, so all metrics of a step go into one call.
            metrics: Numbers, or tensors of one element, by name.

        Raises:
            ValueError: If the step was logged before.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step {step} after step {self._last_step}: log all metrics of a step in one call, in order"
            )
        numbers = {name: _strict(value) for name, value in metrics.items() if name != "step"}
        _append(self.folder / METRICS, [{"step": step, **numbers}])
        self._last_step = step

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append one line a sample to samples.jsonl; text stays text, numbers as in `log`."""
        _append(
            self.folder / SAMPLES,
            [
                {"step": step, **{k: _strict(v) if _is_number(v) else v for k, v in sample.items()}}
                for sample in samples
            ],
        )

    def truncate_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl and samples.jsonl beyond a step, and a last line cut off by a kill.

        Args:
            step: Step of the checkpoint that the run continues from; -1 drops every line.

        Raises:
            ValueError: If a line before the last is not JSON: something else wrote into the file.
        """
        for name in (METRICS, SAMPLES):
            _truncate(self.folder / name, step)
        self._last_step = min(self._last_step, step)

    def save_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Any,
        write: Callable[[Path], None] | None = None,
    ) -> Checkpoint:
        """Write a checkpoint that is either complete or not there, then drop those beyond the newest kept.

        Args:
            step: Updates done.
            tensors: For each safetensors file, by name without suffix, its tensors (see `flatten_state`).
            state: Anything that strict JSON can hold.
            write: Called with the temporary folder, to write models beside the rest as Hugging Face folders.

        Raises:
            ValueError: If the step has a checkpoint already, or the state holds NaN.
        """
        target = self.folder / CHECKPOINTS / f"step-{step:06d}"
        if target.exists():
            raise ValueError(f"step {step} has a checkpoint already: {target}")
        _remove_temporary(target.parent)
        temporary = target.with_name(TEMPORARY + target.name)
        temporary.mkdir()
        for name, named in tensors.items():
            save_file(dict(named), temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        if write is not None:
            write(temporary)
        _sync_tree(temporary)
        temporary.rename(target)
        _sync(target.parent)
        for old in checkpoints(self.folder)[: -self.keep_checkpoints]:
            # Renamed first: whatever is called step-* is whole, also while this removes it.
            shutil.rmtree(old.path.rename(old.path.with_name(TEMPORARY + old.path.name)))
        return Checkpoint(step=step, path=target)

    def write_folder(self, name: str, write: Callable[[str], None]) -> None:
        """Write a folder such as model/ that is either complete or not there; one of that name is replaced.

        Args:
            name: Its name in the run folder.
            write: Called with a temporary folder.
        """
        target = self.folder / name
        temporary = target.with_name(TEMPORARY + name)
        temporary.mkdir()
        write(str(temporary))
        _sync_tree(temporary)
        if target.exists():
            shutil.rmtree(target.rename(self.folder / f"{TEMPORARY}old-{name}"))
        temporary.rename(target)
        _sync(self.folder)

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint, None if there is none."""
        return latest_checkpoint(self.folder)


def check_run_folder(folder: str | Path, config: str, *, resume: bool) -> None:
    """Refuse a run folder that `Run.open` would refuse, before any long work and without making it.

    Args:
        folder: The run folder.
        config: The resolved configuration as YAML text.
        resume: Whether what the folder holds is to be continued.

    Raises:
        ValueError: As `Run.open`.
    """
    check_place(folder)
    if Path(folder).is_dir():
        _check_contents(Path(folder), config, resume=resume)


def check_place(folder: str | Path) -> None:
    """Refuse a folder that can be neither written nor made; nothing is left behind.

    Args:
        folder: A folder, there or not.

    Raises:
        ValueError: If the folder, or the nearest one above that is there, cannot be written.
    """
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    try:
        # Tried, not asked: root may do what permissions forbid, and not what a file system cannot.
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=nearest).cleanup()
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be written ({error.strerror}); choose another") from error


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run folder, oldest first."""
    names = (re.fullmatch(r"step-(\d{6,})", path.name) for path in (folder / CHECKPOINTS).glob("step-*"))
    steps = sorted((int(name[1]), name[0]) for name in names if name)
    return [Checkpoint(step=step, path=folder / CHECKPOINTS / name) for step, name in steps]


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run folder, None if there is none."""
    return next(reversed(checkpoints(folder)), None)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file of a run; none if it is absent.

    A last line without its end, cut off by a kill, is not a record; `is_cut_off` tells.

    Returns:
        One dictionary a line; a null is read as NaN, which it was when `Run.log` wrote it.

    Raises:
        ValueError: If a line is not a JSON object with a step.
    """
    return [record for _, record in _lines(path)]


def is_cut_off(path: Path) -> bool:
    """Tell whether the last line lacks its end: the writer was killed in it, or is writing now."""
    content = path.read_bytes() if path.exists() else b""
    return bool(content) and not content.endswith(b"\n")


def flatten_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of nested mappings by dotted name, such as `ppo.lam`; lists stay whole."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config} if prefix else {}
    settings: dict[str, Any] = {}
    for key, value in config.items():
        settings |= flatten_config(value, f"{prefix}.{key}" if prefix else str(key))
    return settings


def read_settings(config: str) -> dict[str, Any]:
    """Return the settings of a configuration text by dotted name, without those that only say where a run writes."""
    settings = flatten_config(yaml.safe_load(config))
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] not in PLACE_KEYS}


def _locked(folder: Path) -> FileLock:
    """Keep other processes out of a run folder; the system lets go of it when this process ends, however it ends."""
    lock = FileLock(folder / LOCK, is_singleton=True)  # a process may open its own run again
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process writes into {folder}; wait for it, stop it, or choose another") from error
    return lock


def _check_contents(folder: Path, config: str, *, resume: bool) -> None:
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # A run killed before its configuration was written leaves no more than these.
    beginnings = {LOCK, f"{TEMPORARY}{CONFIG}", *([] if checkpoints(folder) else [CHECKPOINTS])}
    contents = {path.name for path in folder.iterdir()} - beginnings
    if not contents:
        return
    if not resume:
        raise ValueError(f"run folder {folder} is not empty; resume it (--resume), or choose another")
    if CONFIG not in contents:
        raise ValueError(f"{folder} is not empty and holds no {CONFIG}: not a run folder; choose another")
    differences = _differences(read_settings((folder / CONFIG).read_text(encoding="utf-8")), read_settings(config))
    if differences:
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ValueError(f"{folder} is a run of another configuration: {shown}. Give the same, or another folder")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    absent = "absent"
    return [
        f"{key} is {there.get(key, absent)!r} there and {here.get(key, absent)!r} here"
        for key in {**there, **here}
        if (key in there) != (key in here) or there[key] != here[key]
    ]


def _strict(value: Any) -> float | int | None:
    number = int(value) if isinstance(value, Integral) else float(value)
    return number if math.isfinite(number) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | Tensor)


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    with path.open("ab") as file:
        # A lone surrogate, which a byte-level tokenizer may decode to, cannot be UTF-8; it is written as "?".
        file.write(text.encode("utf-8", errors="replace"))
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each complete line with the offset it starts at."""
    offset = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], start=1):
        if not line.endswith(b"\n"):
            return
        yield offset, _record(line, f"{path}, line {number}")
        offset += len(line)


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{place}: not an object with a whole number `step`")
    return {name: math.nan if value is None else value for name, value in record.items()}


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    beyond = (offset for offset, record in _lines(path) if record["step"] > step)
    content = path.read_bytes()
    end = next(beyond, content.rfind(b"\n") + 1)
    if end < len(content):
        os.truncate(path, end)
        _sync(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either whole or not there."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
