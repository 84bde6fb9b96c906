import re
import shlex
from pathlib import Path

import pytest
import yaml

from apportion.cli import COMMANDS
from apportion.recipes import NOTES, names
from apportion.train.run import flatten_config
from command_line import apportion, refusal

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "src" / "apportion" / "recipes"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def content(recipe: str) -> dict:
    return yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())


SECTIONS = [(recipe, command) for recipe in names() for command in content(recipe) if command not in NOTES]


def test_every_recipe_is_listed_with_what_it_is_and_its_commands() -> None:
    shown = apportion("recipes")
    assert (shown.code, shown.err) == (0, "")
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == names()
    for recipe, line in zip(names(), shown.out.splitlines(), strict=True):
        described = content(recipe)
        assert described.pop("description").strip() in line
        assert line.endswith(f"({', '.join(key for key in described if key not in NOTES)})")


@pytest.mark.parametrize("recipe", names())
def test_a_recipe_is_shown_as_it_is_and_can_be_used_as_a_file(recipe: str, here: Path) -> None:
    shown = apportion("recipes", recipe)
    assert shown.out == (FOLDER / f"{recipe}.yaml").read_text()
    (here / "mine.yaml").write_text(shown.out)
    command = next(command for name, command in SECTIONS if name == recipe)
    by_name, by_path = (apportion(command, "--config", config, "--print_config") for config in (recipe, "mine.yaml"))
    assert by_name == by_path
    assert by_name.code == 0


@pytest.mark.parametrize(("recipe", "command"), SECTIONS)
def test_a_section_means_what_it_says(recipe: str, command: str) -> None:
    shown = apportion(command, "--config", recipe, "--print_config")
    assert (shown.code, shown.err) == (0, "")
    resolved = flatten_config(yaml.safe_load(shown.out))
    for key, wanted in flatten_config(content(recipe)[command]).items():
        found = resolved.get(key, resolved.get(f"{key}.class_path"))  # a class may stand by its name alone
        assert found == wanted or str(found).rpartition(".")[2] == wanted, key


@pytest.mark.parametrize(("recipe", "command"), SECTIONS)
@pytest.mark.usefixtures("here")
def test_a_section_holds_values_that_are_accepted(recipe: str, command: str) -> None:
    output = "--output" if command in ("generate", "pass-at-k") else "--output_dir"
    given = ["--model", "./nowhere", output, "out"]
    if command == "ppo" and "reward_function" not in content(recipe)[command]:
        given += ["--reward_model", "./nowhere"]
    told = refusal(apportion(command, "--config", recipe, *given))
    assert "model folder ./nowhere does not exist" in told  # all settings were read before


def test_every_section_is_of_a_command() -> None:
    assert {command for _, command in SECTIONS} <= COMMANDS.keys()


def code(text: str) -> list[str]:
    """List the lines of code blocks, fenced or indented, with continued lines joined, and code within lines."""
    fenced = "".join(re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = "".join(line + "\n" for line in prose.splitlines() if line.startswith("    "))
    return re.sub(r"\\\n *", " ", fenced + indented).splitlines() + re.findall(r"`([^`\n]+)`", prose)


def commands(text: str) -> list[list[str]]:
    """List the commands in a document that can be run as they stand, without placeholders."""
    lines = [line.strip().removeprefix("$ ") for line in code(text)]
    found = [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\S*bin/)?apportion [a-z]", line)]
    return [words for words in found if not any(re.search(r"\.\.\.|[|<>]|^[A-Z_]+$", word) for word in words)]


def test_commands_are_found_in_fences_in_indented_code_and_within_lines() -> None:
    indented = "    apportion ppo --model m \\\n        --seed 3  # why\n"
    text = f"Run `apportion recipes`.\n\n{indented}\n```bash\n$ apportion sft\n```\n"
    assert commands(text) == [["sft"], ["ppo", "--model", "m", "--seed", "3"], ["recipes"]]
    assert commands("apportion ppo is a command; `apportion compare RUN...` is a pattern") == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
@pytest.mark.usefixtures("here")
def test_the_commands_in_a_document_are_understood(document: Path) -> None:
    for words in commands(document.read_text()):
        asked = words if words[0] == "recipes" or "help" in shlex.join(words) else [*words, "--print_config"]
        shown = apportion(*asked)
        assert (shown.code, shown.err) == (0, ""), f"{document.name}: apportion {shlex.join(words)}: {shown.err}"


def test_the_readme_names_a_command() -> None:
    assert ["quickstart"] in commands((ROOT / "README.md").read_text())
