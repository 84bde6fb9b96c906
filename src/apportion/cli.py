"""The command line: parsing and calls, no logic. Each command imports what it needs when it is called."""

import difflib
import importlib
import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from apportion.recipes import NOTES, text_of


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
    "task": Command(
        help="write a built-in task: a base model with its tokenizer, and data",
        module="apportion.data.tasks",
        settings="Task",
        function="write_task",
        positional="name",
    ),
    "generate": Command(
        help="write responses to held-out prompts, with reward, KL and length, as JSON lines",
        module="apportion.evaluate.generate",
        settings="Generate",
        function="generate",
    ),
    "pass-at-k": Command(
        help="measure how many programming problems are solved in k tries, from samples or a model",
        module="apportion.evaluate.pass_at_k",
        settings="PassAtK",
        function="measure_pass_at_k",
    ),
    "compare": Command(
        help="make a report of several runs: curves, table, samples",
        module="apportion.evaluate.compare",
        settings="Compare",
        function="compare_runs",
        positional="runs",
    ),
    "control": Command(
        help="run settings of credit beside those they stand against on the task reviews, over seeds, and report",
        module="apportion.control",
        settings="Control",
        function="control",
        positional="names",
    ),
    "sandbox": Command(
        help="see what holds on this machine for programs that a policy wrote: apportion sandbox check",
        module="apportion.score.sandbox_check",
        settings="SandboxCheck",
        function="check",
        positional="action",
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
        0; 2 after an error that the user can mend, which is told in one line, and with APPORTION_TRACEBACK=1 as it
        came about; 130 when interrupted.
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
    except KeyboardInterrupt:
        print(f"apportion {name}: interrupted", file=sys.stderr)
        return 130


def _run(name: str, argv: list[str]) -> int:
    """Parse the settings of a command and call it."""
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}{_nearest(name, COMMANDS)}; one of {', '.join(COMMANDS)}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own classes and functions, by dotted path
    _quieten()
    command = COMMANDS[name]
    configurations, argv = _with_configurations(name, argv)
    module = importlib.import_module(command.module)
    settings = getattr(module, command.settings)
    parser = _parser(name, command, settings)
    try:
        parsed = parser.parse_args([*configurations, *_with_values(argv, command, settings)])
        text = parser.dump(parsed, skip_unset=False)
        chosen = parser.instantiate(parsed)
    except (ArgumentError, ValueError) as error:
        raise ValueError(_reason(str(error), parser._option_string_actions)) from error
    given = settings(**{f.name: getattr(chosen, f.name) for f in fields(settings)})
    function = getattr(module, command.function)
    written = function(given, text) if command.keeps_config else function(given)
    if written is not None:
        print(f"{name}: {written}")
    return 0


def _parser(name: str, command: Command, settings: type) -> Any:
    """Make the parser of a command from the dataclass of its settings."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

    # Abbreviations would take a misspelt setting for another one.
    parser = ArgumentParser(prog=f"apportion {name}", description=command.help, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe by name, or a YAML file; flags override it")
    parser.add_class_arguments(settings)
    return parser


def _with_configurations(name: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """Take out each --config, as the text of its settings; they come first, so that flags override them."""
    configurations, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            word = f"--config={words.pop(0)}"
        if word.startswith("--config="):
            configurations.append(f"--config={_section(word.removeprefix('--config='), name)}")
        else:
            rest.append(word)
    return configurations, rest


def _with_values(argv: list[str], command: Command, settings: type) -> list[str]:
    """Give every flag its value: `--resume` is true, words after a list are its items, words alone the positional."""
    switches, lists = set(_flags(settings, _is_switch)), set(_flags(settings, _is_list))
    done, alone = [], []
    for flag, words in _groups(argv):
        if flag.partition("=")[0].endswith(".help"):
            return [_asked_of_a_class(flag, words, settings)]  # jsonargparse takes what follows for the class's
        if flag in lists:
            is_yaml = len(words) == 1 and (words[0] == "null" or words[0].startswith("["))
            done.append(f"{flag}={words[0] if is_yaml else json.dumps(words)}")
        elif not words and (flag in switches or _is_inside_a_class(flag, settings)):
            if flag not in switches and not _may_be_a_switch(flag):
                raise ValueError(f"{flag} has no value; give it one, {flag}='-...' where it begins with a dash")
            done.append(f"{flag}=true")
        else:
            taken = 0 if not flag or "=" in flag else 1
            name, _, value = flag.partition("=") if not taken else (flag, "", words[0] if words else "")
            if _is_text_of_a_class(name, settings) and value:
                holder, _, attribute = name.rpartition(".")
                done.append(f"{holder.removesuffix('.init_args')}.init_args={json.dumps({attribute: value})}")
            else:
                done += [flag, *words[:taken]] if flag else []
            alone += words[taken:]
    if command.positional and alone:
        items = f"--{command.positional}" in lists
        if len(alone) > 1 and not items:
            raise ValueError(f"{alone[1]!r} is one too many; give one {command.positional}")
        return [*done, f"--{command.positional}={json.dumps(alone) if items else alone[0]}"]
    return done + alone


def _asked_of_a_class(flag: str, words: list[str], settings: type) -> str:
    """Give the question for the settings of a class its class: `--credit.termination.help Perplexity`.

    That of a class inside of another one (`--credit.termination.inner.help`) is asked of the outer setting.
    """
    name, _, value = flag.partition("=")
    kind = value or " ".join(words)
    if not kind:
        raise ValueError(f"{name} has no value; give a class that {name.removesuffix('.help')} can be, or see --help")
    flags = _flags(settings, lambda kind: not _is_group(kind))
    holder = next((flag for flag in flags if name.startswith(f"{flag}.")), name.removesuffix(".help"))
    return f"{holder}.help={kind}"


def _groups(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Put each flag together with the words that follow it; the first flag is none."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in argv:
        if re.match(r"-(?!\.?\d)", word):  # a negative number is no flag
            groups.append((word, []))
        else:
            groups[-1][1].append(word)
    return groups


def _flags(settings: type, wanted: Callable[[Any], bool], prefix: str = "--") -> Iterator[str]:
    """List the flags of settings of a kind, those of nested groups included."""
    for name, kind in get_type_hints(settings).items():
        if wanted(kind):
            yield prefix + name
        elif _is_group(kind):
            yield from _flags(kind, wanted, f"{prefix}{name}.")


def _is_inside_a_class(flag: str, settings: type) -> bool:
    """Tell whether a flag without a value belongs to a class that is chosen by name, where only a switch has none."""
    return "." in flag and "=" not in flag and flag not in _flags(settings, lambda kind: not _is_group(kind))


def _may_be_a_switch(flag: str) -> bool:
    """Tell whether a class has a switch of this name, or a class of the user's may, which is not loaded yet."""
    kinds = _kinds_of(flag)
    return not kinds or any(map(_is_switch, kinds))


def _is_text_of_a_class(flag: str, settings: type) -> bool:
    """Tell whether a flag is text in every class that has it, which then is not to be read as YAML: `[.!?]`, `#`."""
    kinds = _kinds_of(flag) if _is_inside_a_class(flag, settings) else []
    return bool(kinds) and all(kind is str for kind in kinds)


def _kinds_of(flag: str) -> list[Any]:
    """List the types that settings of this name have in the classes that are loaded."""
    name = flag.rpartition(".")[2]
    return [hints[name] for kind in _loaded() if is_dataclass(kind) and name in (hints := get_type_hints(kind))]


def _is_group(kind: Any) -> bool:
    return is_dataclass(kind) and isinstance(kind, type)


def _is_switch(kind: Any) -> bool:
    return kind is bool


def _is_list(kind: Any) -> bool:
    return list in (get_origin(kind), *map(get_origin, get_args(kind)))


def _section(config: str, command: str) -> str:
    """Read a configuration by name or path, and return the settings of one command as text."""
    import yaml

    try:
        content = yaml.safe_load(_text_of(config)) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} holds no settings; write them as `name: value`")
    others = [key for key in content if key not in COMMANDS.keys() | NOTES]
    if content.keys() & COMMANDS.keys() and not others:
        if command not in content:
            sections = ", ".join(key for key in content if key not in NOTES)
            raise ValueError(f"{config} has no section {command!r}; it has {sections}")
        content = content[command] or {}
    elif content.keys() & COMMANDS.keys() - {"ppo"}:  # which is a setting as well, of the command of this name
        raise ValueError(f"{config} has sections, but {others[0]!r} is no command{_nearest(str(others[0]), COMMANDS)}")
    return yaml.safe_dump(content, sort_keys=False)


def _text_of(config: str) -> str:
    """Find a configuration: a file, or one of the recipes of this package."""
    path = Path(config)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"configuration {config} does not exist")
        return path.read_text(encoding="utf-8")
    return text_of(config)


def _nearest(word: str, known: Iterable[str]) -> str:
    """Suggest what a user may have meant: a name that is spelt alike, or one that ends alike after its dots."""
    names = {name.lstrip("-").rpartition(".")[2].lower(): name for name in known} | {n.lower(): n for n in known}
    near = dict.fromkeys(names[match] for match in difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.6))
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _reason(message: str, options: Iterable[str]) -> str:
    """Choose what tells the user what to mend out of jsonargparse's explanation, and name the setting."""
    keys, chosen, reason = [], "", ""
    for line in map(str.strip, message.splitlines()):
        line = line.removeprefix("- ")
        if found := re.fullmatch(r'Parser key "([\w.]+)":', line):
            keys.append(found[1])
        elif found := re.fullmatch(r"Problem with given class_path '([\w.]+)':", line):
            chosen = found[1]
        elif line and not re.match("Does not validate against|Subtypes:|Errors:", line):
            reason = line
            break
    given = re.search(r"Given value: (.*)", message)
    setting = keys[-1] if keys else ""
    reason = _reworded(reason, given[1] if given else "", chosen, setting, options)
    if chosen and f"--{'.'.join(keys)}.help" in options:
        reason = reason.replace("see --help", f"see --{'.'.join(keys)}.help {chosen}")
    return f"--{'.'.join(keys)}: {reason}" if keys else reason


def _reworded(reason: str, value: str, chosen: str, setting: str, options: Iterable[str]) -> str:
    """Say one of jsonargparse's reasons with the value and the remedy."""
    if found := re.match(r"(--[\w.]+: )?Expected a dot import path string: (.*)", reason):
        others = _classes() - {found[2]}  # which is a class, but of another kind, where it is among them
        no_class = f"there is no class {found[2]!r} for it{_nearest(found[2], others)}; give its name or dotted path"
        return (found[1] or "") + no_class
    if found := re.match(r"(--[\w.]+: )?(No module named .*)", reason):
        told = f"{chosen or 'it'} cannot be imported ({found[2]}); give a dotted path such as my_module.MyClass"
        return (found[1] or "") + told
    if found := re.match(r"Import path does not correspond to a subclass of (\w+)", reason):
        return f"{value} is not a subclass of {found[1]}; derive it from that"
    if found := re.match(r"Expected a (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])(?:\. Got value: (.*))?", reason):
        given = found[3] or value
        if found[1] in ("float", "int") and given in ("nan", "inf", "-inf"):
            return f"{given} is given; give a finite number"
        if found[1] in ("tuple", "list"):
            return f"{given} is given; give a list{_of_what(chosen, setting)}"
        return f"{given} is given; give {found[1] or f'one of {found[2]}'}"
    if found := re.match(r"the following arguments are required: (.*)", reason):
        return f"{found[1]} has no default; give it"
    if found := re.match(r"unrecognized arguments: (.*)", reason):
        return f"there is no setting {found[1]}{_nearest(found[1].split()[0], options)}; see --help"
    if found := re.match(r"Option '(.*)' is not accepted", reason):
        of = f" of {chosen}" if chosen else ""
        known = _settings_of(chosen) if chosen else [option.removeprefix("--") for option in options]
        return f"there is no setting {found[1]!r}{of}{_nearest(found[1], known)}; see --help"
    return reason


def _classes() -> set[str]:
    """List the names of the classes that are loaded and may be chosen."""
    return {value.__name__ for value in _loaded()} & {*sys.modules["apportion"].__all__}


def _loaded() -> set[type]:
    """List the classes of apportion that are loaded."""
    modules = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("apportion.")]
    classes = {value for module in modules for value in module.values() if isinstance(value, type)}
    return {value for value in classes if value.__module__.startswith("apportion.")}


def _settings_of(path: str) -> dict[str, Any]:
    """List the settings of a class, with their types."""
    module, _, name = path.rpartition(".")
    return get_type_hints(getattr(importlib.import_module(module), name))


def _of_what(path: str, setting: str) -> str:
    """Show what a list of a class's settings holds, where that has settings of its own."""
    kinds = get_args(_settings_of(path).get(setting)) if path else ()
    settings = [field.name for kind in kinds if is_dataclass(kind) for field in fields(kind)]
    items = f"[{{{', '.join(f'{name}: ...' for name in settings)}}}, ...]" if settings else "'[0, 1]'"
    return f" such as {items}"


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
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
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
            "Options of a command: apportion COMMAND --help. Those of a class: --credit.termination.help Perplexity.",
            "Its settings, resolved: --print_config.",
        ]
    )
