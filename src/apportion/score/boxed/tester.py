"""The process that runs the tests of a call task. It has the program by a pipe only, and reads plain values from it."""

import ast
import builtins
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from .frames import Broken, read_frame, write_frame
from .plain import NotPlain, dumps, loads


class ProgramDied(BaseException):
    """The program's process is gone."""


class Program:
    """The other end of the pipe.

    Attributes:
        failure: What the program raised last, or how it ended: kind, message, line.
        raised: The error that a test sees of that.
        died: Whether its process is gone.
    """

    def __init__(self, requests: int, replies: int, longest: int) -> None:
        self.requests, self.replies, self.longest = requests, replies, longest
        self.failure: tuple[str, str, int] | None = None
        self.raised: BaseException | None = None
        self.died = False

    def begin(self) -> None:
        """Wait until the program has defined what it defines."""
        self._reply()

    def call(self, name: str, args: str) -> str:
        """Call a function with arguments in their plain form; return what it returns in that form."""
        return dumps(self.ask("call", name, loads(args.encode()), {})).decode()

    def ask(self, *question: Any) -> Any:
        """Ask and wait; an error of the program's is raised here as the builtin of that name."""
        try:
            write_frame(self.requests, dumps(question, _number_of))
        except Broken as error:
            raise self._lost(error) from None
        return self._reply()

    def _reply(self) -> Any:
        try:
            reply = loads(read_frame(self.replies, self.longest), lambda number: Thing(self, number))
        except (Broken, NotPlain) as error:
            raise self._lost(error) from None
        match reply:
            case ("value", value):
                return value
            case ("error", str(kind), str(message), int(line)):
                self.failure, self.raised = (kind, message, line), _error(kind)(message)
                raise self.raised
        raise self._lost(NotPlain("no reply"))

    def _lost(self, error: Exception) -> ProgramDied:
        self.failure, self.died = (type(error).__name__, str(error), 0), True
        self.raised = ProgramDied()
        return self.raised


class Thing:
    """An object of the program's, which stays there. It equals nothing, and is neither true nor false."""

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_of", (program, number))

    def __getattr__(self, name: str) -> Any:
        return self._of[0].ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._of[0].ask("set", self, name, value)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call it there."""
        return self._of[0].ask("call", self, args, keywords)

    def _without_value(self, *_: Any) -> Any:
        raise TypeError("an object of the program's own has no plain value")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _without_value
    __hash__ = object.__hash__


class Function:
    """A function of the program's, by name."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call it there; what it returns comes back as a plain value."""
        return self.program.ask("call", self.name, args, keywords)


def run(program: Program, job: dict[str, Any], results: int) -> None:
    """Run tests one by one, and write a message of each, after one of how the program began.

    Args:
        program: What they test; its first reply says whether it could be run at all.
        job: `tests`: for `checks` their source, with `setup` before each; for `calls` the arguments of `function`.
        results: Where the messages go: `{"end": "ready" | "passed" | "failed" | "error" | "returned", ...}`.
    """
    tell(results, begun := _result(program, program.begin, "ready"))
    if begun["end"] != "ready":
        return
    for test in job["tests"]:
        if job["mode"] == "calls":
            found = _result(program, lambda test=test: program.call(job["function"], test), "returned")
        else:
            found = _result(program, lambda test=test: _check(program, job["setup"], test), "passed")
        tell(results, found)
        if found["end"] == "error":
            return


def tell(results: int, found: dict[str, Any]) -> None:
    """Write a message."""
    write_frame(results, json.dumps(found).encode())


def _result(program: Program, test: Callable[[], Any], end: str) -> dict[str, Any]:
    """Run one test. An error of the program's that the test catches is the test's affair, but not that it is gone."""
    value, caught = None, None
    try:
        value = test()
    except BaseException as error:
        caught = error
    if program.failure is not None and (program.died or (caught is not None and caught is program.raised)):
        kind, message, line = program.failure
        return {"end": "error", "message": f"{kind}: {message}", "line": line, "died": program.died}
    if caught is not None:
        return {"end": "failed", "message": f"{type(caught).__name__}: {caught}"[:500]}
    return {"end": end, "value": value}


def _check(program: Program, setup: str, test: str) -> None:
    """Run the source of a test, with the program's functions where it names something that it does not define."""
    source = f"{setup}\n{test}"
    names: dict[str, Any] = {"__name__": "__test__"}
    tree = ast.parse(source)
    names |= {name: importlib.import_module(name) for name in _modules(tree)}
    names |= {name: Function(program, name) for name in _missing(tree) - names.keys()}
    exec(compile(tree, "<test>", "exec", dont_inherit=True), names)


def _number_of(thing: Any) -> int:
    """Give the number of an object of the program's; anything else cannot be sent."""
    if type(thing) is not Thing:
        raise NotPlain(f"an argument of type {type(thing).__name__} cannot be sent to a program")
    return thing._of[1]


def _modules(tree: ast.Module) -> set[str]:
    """List the modules that a test reads from, as if the program had imported them for it."""
    owners = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {owner.id for owner in owners if isinstance(owner, ast.Name)}
    return read & _missing(tree) & sys.stdlib_module_names


def _missing(tree: ast.Module) -> set[str]:
    """List the names that a test reads and does not define: those of the program.

    A builtin is the program's only where the test reads nothing else of it, for then it has to be what is tested;
    otherwise a program could count what it returns by a `len` of its own.
    """
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    defined = {node.id for node in found if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(name.asname or name.name).partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    read = {node.id for node in found} - defined
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return read - vars(builtins).keys() or read & called


def _error(kind: str) -> type[Exception]:
    """Find a builtin error by name; any other is a RuntimeError."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, UnicodeError):
        return found
    return RuntimeError
