"""Recipes: settings that are known by name, one YAML file each, with a section for each command."""

import difflib
from dataclasses import dataclass
from importlib.resources import files

NOTES = frozenset({"description", "beside"})
"""What a recipe holds besides a section for each command."""


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
        Their names, sorted; those of a folder, such as `controls/lam-1`, with its name.
    """
    root = files(__name__)
    inner = (f"{folder.name}/{f.name}" for folder in root.iterdir() if folder.is_dir() for f in folder.iterdir())
    found = (*(f.name for f in root.iterdir()), *inner)
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def text_of(name: str) -> str:
    """Read a recipe.

    Args:
        name: One of `names()`.

    Returns:
        YAML text.

    Raises:
        ValueError: If there is no recipe of that name; with near matches.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"there is no recipe {name!r}{hint}; see `apportion recipes`")
    return files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def show(settings: Recipes) -> None:
    """Print a recipe, or a line on each.

    Raises:
        ValueError: If there is no recipe of that name.
    """
    import yaml

    if settings.name is None:
        for name in names():
            content = yaml.safe_load(text_of(name))
            commands = ", ".join(key for key in content if key not in NOTES)
            print(f"{name}: {content.get('description', '').strip()} ({commands})")
        return
    print(text_of(settings.name), end="")
