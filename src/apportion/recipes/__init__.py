"""Recipes: settings that are known by name, one YAML file each, with a section for each command."""

import difflib
from dataclasses import dataclass
from importlib.resources import files

import yaml


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """What `apportion recipes` shows.

    Attributes:
        name: A recipe to show; the list of all by default.
    """

    name: str | None = None


def names() -> list[str]:
    """List the recipes.

    Returns:
        Their names, sorted.
    """
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def show(settings: Recipes) -> None:
    """Print a recipe, or a line on each.

    Raises:
        ValueError: If there is no recipe of that name.
    """
    if settings.name is None:
        for name in names():
            content = yaml.safe_load(files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
            commands = ", ".join(key for key in content if key != "description")
            print(f"{name}: {content.get('description', '').strip()} ({commands})")
        return
    if settings.name not in names():
        near = difflib.get_close_matches(settings.name, names(), n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"there is no recipe {settings.name!r}{hint}; one of {', '.join(names())}")
    print(files(__name__).joinpath(f"{settings.name}.yaml").read_text(encoding="utf-8"), end="")
