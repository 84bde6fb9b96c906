"""A process that parses: `python -m apportion.parsing.worker`, spoken to over its standard streams.

It ends when its standard input does, so it never outlives the process that started it, however that one ends. First
comes the parser, then lists of texts; each is answered by one message. Whatever the parser prints goes to the standard
error stream.
"""

import contextlib
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, BinaryIO

from apportion.credit.parse import ParseTree
from apportion.parsing.parsers import Parse, Parser

Trees = tuple[ParseTree, ...]


def parsed(parser: Parser | Parse, texts: Sequence[str]) -> list[Trees | None]:
    """Parse texts; None for those that the parser cannot parse, whatever it raises.

    Args:
        parser: Any parser.
        texts: Some texts.

    Returns:
        The trees of each, in order.
    """
    try:
        found = parser.many(texts) if isinstance(parser, Parser) else [parser(text) for text in texts]
        if len(found) != len(texts):
            raise ValueError(f"{len(found)} lists of trees for {len(texts)} texts")
        return [_checked(trees) for trees in found]
    except Exception as error:  # of a library, or of a user's own parser; training must not stop for it
        if len(texts) == 1:
            name = getattr(parser, "__qualname__", None)
            told = parser if name is None else f"{parser.__module__}.{name}"
            print(f"apportion: {told} cannot parse {texts[0]!r}: {error!r}", file=sys.stderr)
            return [None]
        return [found for text in texts for found in parsed(parser, [text])]


def _checked(trees: Any) -> Trees:
    """Refuse what are no trees."""
    if bad := [type(tree).__name__ for tree in trees if not isinstance(tree, ParseTree)]:
        raise TypeError(f"a parser returns ParseTrees, not {bad[0]}; make them with ParseTree.of")
    return tuple(trees)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end, and then end the process at once, whatever it is doing.

    Args:
        requests: Pickled: the parser, then lists of texts.
        answers: Pickled: None, or the reason why the parser cannot be loaded; then what `parsed` gives.
    """

    def answer(content: Any) -> None:
        pickle.dump(content, answers)
        answers.flush()

    try:
        parser = pickle.load(requests)
        if isinstance(parser, Parser):
            parser.load()
    except Exception as error:  # told to the user by the process that asked
        answer(f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        return
    answer(None)
    jobs: SimpleQueue[list[str]] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, jobs), daemon=True).start()
    while True:
        answer(parsed(parser, jobs.get()))


def _listen(requests: BinaryIO, jobs: "SimpleQueue[list[str]]") -> None:
    """Take requests while others are worked on; their end is that of the process, which has nothing to save."""
    try:
        while True:
            jobs.put(pickle.load(requests))
    finally:
        os._exit(0)


def main() -> None:
    """Serve on the standard streams; what is printed must not run into the answers."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        serve(requests, answers)


if __name__ == "__main__":
    main()
