"""Syntax trees of programs, by tree-sitter."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from typing import Any

from apportion.credit.parse import ParseTree, Span
from apportion.parsing.parsers import Parser, ParserUnavailable


@dataclass(frozen=True)
class TreeSitter(Parser):
    """The syntax tree of a program, whole or broken: what cannot be read becomes a node of its own.

    Attributes:
        language: Of the package `tree_sitter_<language>`, which has to be installed: python, c, rust, ...

    Raises:
        ValueError: If the language can be no part of a package's name.

    Source:
        https://tree-sitter.github.io/tree-sitter
    """

    language: str = "python"

    def __post_init__(self) -> None:
        """Refuse what can be no part of a package's name."""
        if not (isinstance(self.language, str) and self.language.isidentifier()):
            raise ValueError(
                f"language is {self.language!r}; give that of a package tree_sitter_<language>, such as python or cpp"
            )

    @cached_property
    def _parser(self) -> Any:
        try:
            library, grammar = import_module("tree_sitter"), import_module(f"tree_sitter_{self.language}")
        except ImportError as error:
            packages = f"tree-sitter tree-sitter-{self.language.replace('_', '-')}"
            raise ParserUnavailable(
                f"programs in {self.language!r} cannot be parsed ({error}); install it: pip install {packages}"
            ) from error
        language = getattr(grammar, "language", None) or getattr(grammar, f"language_{self.language}")
        return library.Parser(library.Language(language()))

    def load(self) -> None:
        """Load the grammar."""
        _ = self._parser

    def __call__(self, text: str) -> Sequence[ParseTree]:
        """Parse a program; a text without words has no tree."""
        data = text.encode(errors="replace")
        begins = _characters(text)
        tree = ParseTree.of(
            self._parser.parse(data).root_node,
            children=lambda node: _parts(node, data),
            span=lambda node: (begins[_bounds(node)[0]], begins[_bounds(node)[1]]),
        )
        return [tree] if tree.words else []


def _parts(node: Any, data: bytes) -> list[Any]:
    """List the children of a node, and as spans of bytes what lies between them, such as the text around an escape."""
    if isinstance(node, tuple) or not node.child_count:
        return []
    children = node.children
    bounds = [(node.start_byte, node.start_byte), *map(_bounds, children), (node.end_byte, node.end_byte)]
    gaps = [_stripped(data, before, after) for (_, before), (after, _) in pairwise(bounds)]
    parts: list[Any] = [gaps[0]]
    for child, gap in zip(children, gaps[1:], strict=True):
        parts += [child, gap]
    return [part for part in parts if part is not None]


def _stripped(data: bytes, start: int, end: int) -> Span | None:
    """Cut white space off both ends; None where nothing else is there."""
    said = data[start:end]
    kept = said.strip()
    lead = len(said) - len(said.lstrip())
    return (start + lead, start + lead + len(kept)) if kept else None


def _bounds(node: Any) -> Span:
    """Return the bytes that a node or a gap covers."""
    return node if isinstance(node, tuple) else (node.start_byte, node.end_byte)


def _characters(text: str) -> Sequence[int]:
    """Say in which character each byte of a text lies."""
    if text.isascii():
        return range(len(text) + 1)
    return [place for place, character in enumerate(text) for _ in character.encode(errors="replace")] + [len(text)]
