"""The command line: parsing and calls, no logic. Each command imports what it needs when it is called."""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        help: What it does, in a line.
        module: Where its settings and its function lie.
        settings: Name of the dataclass that holds its settings.
        function: Name of the function that is called with them.
        keeps_config: Whether the function keeps the resolved settings as text beside what it writes.
        positional: Setting that may be given without its name.
    """

    help: str
    module: str
    settings: str
    function: str
    keeps_config: bool = False
    positional: str | None = None


COMMANDS = {
    "quickstart": Command(
        help="train a small model by PPO, macro actions, attention credit and prefix differences, and compare them",
        module="apportion.quickstart",
        settings="Quickstart",
        function="quickstart",
    ),
    "sft": Command(
        help="fine-tune a language model on prompts and completions (TRL's SFTTrainer)",
        module="apportion.train.sft",
        settings="SFTRecipe",
        function="sft",
    ),
    "reward": Command(
        help="train a reward model on preference pairs (TRL's RewardTrainer)",
        module="apportion.train.reward",
        settings="RewardRecipe",
        function="reward",
    ),
    "ppo": Command(
        help="train a policy by PPO with credit assignment",
        module="apportion.train.launch",
        settings="PPORecipe",
        function="ppo",
        keeps_config=True,
    ),
    "generate": Command(
        help="write responses to held-out prompts, with reward, KL and length, as JSON lines",
        module="apportion.evaluate.generate",
        settings="Generate",
        function="generate",
    ),
    "compare": Command(
        help="make a report of several runs: curves, table, samples",
        module="apportion.evaluate.compare",
        settings="Compare",
        function="compare_runs",
        positional="runs",
    ),
    "recipes": Command(
        help="list the recipes that --config knows by name, or show one",
        module="apportion.recipes",
        settings="Recipes",
        function="show",
        positional="name",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0; 2 after an error that the user can mend, which is told in one line. APPORTION_TRACEBACK=1 tells where.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(version("apportion"))
        return 0
    name, *rest = argv
    try:
        return _run(name, rest)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("APPORTION_TRACEBACK") or not _is_ours(error):
            raise
        return _fail(f"apportion {name}", str(error))


def _run(name: str, argv: list[str]) -> int:
    """Parse the settings of a command and call it."""
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}{_nearest(name, COMMANDS)}; one of {', '.join(COMMANDS)}")
    sys.path.insert(0, os.getcwd())  # a user's own classes and functions, by dotted path
    _quieten()
    command = COMMANDS[name]
    argv = _with_configurations(name, argv)
    module = importlib.import_module(command.module)
    parser = _parser(name, command, module)
    parsed = parser.parse_args(list(_with_values(argv, set(_switches(getattr(module, command.settings))))))
    text = parser.dump(parsed, skip_none=False, skip_link_targets=False)
    try:
        chosen = parser.instantiate(parsed)
    except ValueError as error:
        raise ValueError(_reason(str(error), error)) from error
    settings = getattr(module, command.settings)
    given = settings(**{f.name: getattr(chosen, f.name) for f in fields(settings)})
    function = getattr(module, command.function)
    function(given, text) if command.keeps_config else function(given)
    return 0


def _parser(name: str, command: Command, module: Any) -> Any:
    """Make the parser of a command from the dataclass of its settings."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
            sys.exit(_fail(self.prog, _reason(message, ex)))

    parser = Parser(prog=f"apportion {name}", description=command.help)
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe by name, or a YAML file; flags override it")
    parser.add_class_arguments(getattr(module, command.settings))
    return parser


def _with_configurations(name: str, argv: list[str]) -> list[str]:
    """Replace the value of each --config by the text of its settings, those of this command where it holds several."""
    command, done, rest = COMMANDS[name], [], list(argv)
    if command.positional and rest and not rest[0].startswith("-"):
        given = [word for word in _until_flag(rest)]
        rest = rest[len(given) :]
        done += [f"--{command.positional}={given if command.positional == 'runs' else given[0]}"]
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            word = f"--config={rest.pop(0)}"
        if word.startswith("--config="):
            word = f"--config={_section(word.removeprefix('--config='), name)}"
        done.append(word)
    return done


def _switches(settings: type, prefix: str = "--") -> Iterator[str]:
    """List the flags of settings that are true or false, those of nested groups included."""
    for name, kind in get_type_hints(settings).items():
        if kind is bool:
            yield prefix + name
        elif is_dataclass(kind):
            yield from _switches(kind, f"{prefix}{name}.")


def _with_values(argv: list[str], switches: set[str]) -> Iterator[str]:
    """Read a bare switch as true: `--resume` is `--resume=true`."""
    for word, following in zip_longest(argv, argv[1:], fillvalue="--"):
        yield f"{word}=true" if word in switches and following.startswith("-") else word


def _until_flag(words: list[str]) -> list[str]:
    """Take the words before the first flag."""
    return words[: next((place for place, word in enumerate(words) if word.startswith("-")), len(words))]


def _section(config: str, command: str) -> str:
    """Read a configuration by name or path, and return the settings of one command as text."""
    import yaml

    content = yaml.safe_load(_text_of(config)) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{config} holds no settings; write them as `name: value`")
    if content.keys() & COMMANDS.keys() and not content.keys() - COMMANDS.keys() - {"description"}:
        if command not in content:
            raise ValueError(f"{config} has no section {command!r}; it has {', '.join(content)}")
        content = content[command]
    return yaml.safe_dump(content, sort_keys=False)


def _text_of(config: str) -> str:
    """Find a configuration: a file, or one of the recipes of this package."""
    path = Path(config)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"configuration {config} does not exist")
        return path.read_text(encoding="utf-8")
    from apportion.recipes import names

    if config not in names():
        raise ValueError(f"there is no recipe {config!r}{_nearest(config, names())}; see `apportion recipes`")
    return files("apportion.recipes").joinpath(f"{config}.yaml").read_text(encoding="utf-8")


def _nearest(word: str, known: Any) -> str:
    """Suggest what a user may have meant."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _reason(message: str, error: Exception | None) -> str:
    """Choose what tells the user what to mend out of jsonargparse's explanation, and name the option."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    bullets = re.findall(r"^ *- (.+)$", message, flags=re.MULTILINE)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = bullets[0] if bullets else lines[1] if key and len(lines) > 1 else lines[0] if lines else str(error)
    if unknown := re.match(r"Expected a dot import path string: (.*)", reason):
        reason = f"there is no class {unknown[1]!r} for it; give a class name as in docs/method.md, or a dotted path"
    return f"--{key[1]}: {reason}" if key else reason


def _fail(program: str, message: str) -> int:
    """Tell an error in one line."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _is_ours(error: Exception) -> bool:
    """Tell whether an error was raised to be read by a user: a plain ValueError or OSError, or one of our own."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("apportion.")


def _quieten() -> None:
    """Set what has to be set before torch and transformers are imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _usage() -> str:
    """Say what there is."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "apportion: credit assignment in RLHF",
            "",
            "usage: apportion COMMAND [--config RECIPE_OR_FILE] [--name value ...]",
            "",
            *lines,
            "",
            "Options of a command: apportion COMMAND --help. Its settings, resolved: --print_config.",
        ]
    )
