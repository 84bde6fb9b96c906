"""The process that runs the program. Nothing that it says is a verdict."""

import atexit
import builtins
import os
import sys
from types import CodeType, ModuleType
from typing import Any

from .frames import Broken, read_frame, write_frame
from .plain import NotPlain, dumps, loads

NAME = "<program>"
COMPILED = b"compiled"
HOOK = sys.excepthook
"""Python's own, before a program sets another; `traceback`, which prints the same, takes long to import."""


def show(error: BaseException) -> None:
    """Print an error as Python does."""
    HOOK(type(error), error, error.__traceback__)


def compiled(source: str, status: int) -> CodeType:
    """Compile the program, and tell by `status` how that went: nothing untrusted has run until it is closed."""
    try:
        code = compile(source, NAME, "exec", dont_inherit=True)
    except BaseException as error:
        line = getattr(error, "lineno", None)
        os.write(status, f"{line or 0} {type(error).__name__}: {error}".encode("utf-8", "replace")[:2000])
        os._exit(1)
    os.write(status, COMPILED)
    os.close(status)
    return code


def fresh_main(prelude: str) -> dict[str, Any]:
    """Make the namespace of a script, with what a task promises to have imported."""
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.path += sys.argv[1:]  # the packages
    sys.argv = ["program.py"]
    for name in ("exit", "quit"):  # which `site` adds
        setattr(builtins, name, sys.exit)
    exec(compile(prelude, "<prelude>", "exec"), vars(main))
    return vars(main)


def run_script(code: CodeType, prelude: str) -> None:
    """Run a program to its end as Python would: threads are waited for, what is registered for the end is called."""
    status = 1
    try:
        exec(code, fresh_main(prelude))
        status = 0
    except SystemExit as error:
        status = _status_of(error)
    except BaseException as error:
        show(error)
    try:
        _wait_for_threads()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        show(error)
        status = 1
    os._exit(status)


def serve(code: CodeType, prelude: str, requests: int, replies: int, longest: int) -> None:
    """Run a program, then answer calls of what it defines until there are no more."""
    names, objects = _as_module(fresh_main(prelude)), []

    def number_of(thing: Any) -> int:
        objects.append(thing)
        return len(objects) - 1

    def answer(ask: bytes | None) -> Any:
        if ask is None:
            return exec(code, names)
        operation, target, *rest = loads(ask, objects.__getitem__)
        if operation == "call":
            args, keywords = rest
            return _method(names, target)(*args, **keywords)
        return getattr(target, *rest) if operation == "get" else setattr(target, *rest)

    def answered(ask: bytes | None) -> bytes:
        try:
            reply = dumps(("value", answer(ask)), number_of)
            if len(reply) > longest:
                raise NotPlain(f"a value of {len(reply)} bytes; {longest} is the most")
            return reply
        except BaseException as error:
            return dumps(("error", type(error).__name__, _text(error), _line(error)))

    try:
        write_frame(replies, answered(None))
        while True:
            write_frame(replies, answered(read_frame(requests, longest)))
    except Broken:
        os._exit(0)


def _as_module(names: dict[str, Any]) -> dict[str, Any]:
    """Make a module of the namespace of a script, for a call task does not run what is for scripts.

    What the task imports is not the program's own: it is found as builtins are.
    """
    given = {name: names.pop(name) for name in [*names] if name[:2] != "__"}
    names |= {"__builtins__": vars(builtins) | given, "__name__": "program"}
    sys.modules["program"] = sys.modules["__main__"]  # where dataclasses and pickle look for what it defines
    return names


def _method(names: dict[str, Any], target: Any) -> Any:
    """Find what is called: an object, a name, or the method of APPS's class `Solution`."""
    if not isinstance(target, str):
        return target
    if target not in names and isinstance(solution := names.get("Solution"), type):
        return getattr(solution(), target)
    return names[target]


def _wait_for_threads() -> None:
    """Wait as Python does at the end of a script: for all but daemons, those that are started meanwhile included."""
    if (threading := sys.modules.get("threading")) is None:
        return
    while waiting := [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]:
        for thread in waiting:
            thread.join()


def remove_all(folder: str) -> None:
    """Remove what is in a folder, as far as this process may."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            path = os.path.join(place, name)
            try:
                os.rmdir(path) if name in folders and not os.path.islink(path) else os.unlink(path)
            except OSError:
                continue


def _status_of(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0) & 0xFF
    sys.stderr.write(f"{error.code}\n")
    return 1


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


def _line(error: BaseException) -> int:
    """The last line of the program that the error came through; 0 where there is none."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
