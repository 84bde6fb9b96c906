"""Terminations by parse: a macro action is a constituent of a sentence, or of a program."""

import re
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Bool
from torch import Tensor

from apportion.batch import ResponseTexts, Rollout
from apportion.checks import call_error
from apportion.credit.parse import Span, closing_tokens
from apportion.credit.termination import TerminationCondition, check_whole
from apportion.parsing.parsers import Parse, Parser, Stanza
from apportion.parsing.pool import ParserPool
from apportion.parsing.syntax import TreeSitter
from apportion.parsing.worker import Trees

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class ParseCondition(TerminationCondition):
    """Close where the rules of `credit.parse.closing_tokens` close, by trees of the responses' texts.

    A row whose text cannot be parsed, or whose trees cannot be laid over it, gets one action a token (`fallbacks`);
    where that happens to all rows with text, a warning says so, once. A row without text is one action. The trees of a
    rollout are computed once, `prepare` begins with it.
    """

    cutoff: int
    workers: int

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        check_whole("cutoff", self.cutoff)
        if not isinstance(self.workers, int) or isinstance(self.workers, bool):
            raise ValueError(f"workers is {self.workers!r}; choose a number of processes, or 0 to parse in this one")
        if self.cutoff < 1:
            raise ValueError(f"cutoff is {self.cutoff}; choose at least 1 token, 5 for prose and 10 for programs")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; choose a number of processes, or 0 to parse in this one")

    @property
    @abstractmethod
    def parser(self) -> Parser | Parse:
        """What makes the trees."""

    @abstractmethod
    def parts(self, text: str) -> list[tuple[int, str]]:
        """Divide a text into what is parsed, and remembered, on its own.

        Args:
            text: What a response says.

        Returns:
            Each part that is not blank, with the character that it begins at.
        """

    @property
    def needs(self) -> frozenset[str]:
        """The texts of the responses."""
        return frozenset({"text"})

    def open(self) -> None:
        """Load the parser, so that what is missing is told before any work.

        Raises:
            ValueError: If it cannot be loaded; it says how to install it.
        """
        self._pool.open()

    def prepare(self, rollout: Rollout) -> None:
        """Begin to parse, in other processes.

        Args:
            rollout: Sampled responses with their `text`.

        Raises:
            ValueError: If the text is missing, or the parser cannot be loaded.
        """
        self._pool.submit(self._parts(self._text(rollout)))

    def __call__(self, rollout: Rollout) -> Bool[Tensor, "B T"]:
        """Mark the last tokens of constituents, and the last valid token."""
        return self._segmented(rollout)[0].clone()

    def fallbacks(self, rollout: Rollout) -> Bool[Tensor, " B"]:
        """Mark the rows that could not be parsed and got one action a token.

        Args:
            rollout: Sampled responses with their `text`.

        Returns:
            (B) bool.
        """
        return self._segmented(rollout)[1]

    def close(self) -> None:
        """End the processes that parse."""
        self._pool.close()

    @cached_property
    def _pool(self) -> ParserPool:
        return ParserPool(self.parser, workers=self.workers)

    @cached_property
    def _latest(self) -> list[tuple[ResponseTexts, Tensor, tuple[Tensor, Tensor]]]:
        """The rollout that was parsed last: credit, its metrics and a user may each ask for it."""
        return []

    @cached_property
    def _told(self) -> list[str]:
        """A text of the batch of which a warning told that nothing could be parsed: it tells once."""
        return []

    def _text(self, rollout: Rollout) -> ResponseTexts:
        self.check(rollout)
        assert rollout.text is not None  # checked; for the type checker
        return rollout.text

    def _parts(self, text: ResponseTexts) -> list[str]:
        return [part for said in text.texts for _, part in self.parts(said)]

    def _segmented(self, rollout: Rollout) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
        """Parse a rollout, unless it is the one that was parsed last."""
        text, mask = self._text(rollout), rollout.response_mask
        if not any(text is known and mask is same for known, same, _ in self._latest):
            self._latest[:] = [(text, mask, self._segment(text, mask))]
        return self._latest[0][2]

    def _segment(
        self, text: ResponseTexts, mask: Bool[Tensor, "B T"]
    ) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, " B"]]:
        """Wait for the trees, and lay them over the tokens of each row."""
        trees = self._pool.collect(self._parts(text))
        spans = iter([(start, end) for start, end in text.spans[mask].tolist()])
        rows = [
            (said, list(islice(spans, count))) for said, count in zip(text.texts, mask.sum(1).tolist(), strict=True)
        ]
        answers = [self._row(said, of_row, trees) for said, of_row in rows]
        failed = torch.tensor([answer is None for answer in answers], dtype=torch.bool)
        written = [said for said in text.texts if said.strip()]
        if len(written) == failed.sum() > 1 and not self._told:  # one alone may be an odd text
            self._told.append(written[0])
            warnings.warn(
                f"none of {len(written)} responses could be parsed, so each token is an action of its own, as in "
                f"{written[0][:60]!r}; give that to the backend alone, and see that its spans count characters",
                stacklevel=2,
            )
        flat = [
            close
            for answer, (_, of_row) in zip(answers, rows, strict=True)
            for close in ([True] * len(of_row) if answer is None else answer)
        ]
        closes = torch.zeros(mask.shape, dtype=torch.bool)
        closes[mask.cpu()] = torch.tensor(flat, dtype=torch.bool)
        return closes.to(mask.device), failed.to(mask.device)

    def _row(self, text: str, spans: Sequence[Span], trees: dict[str, Trees | None]) -> list[bool] | None:
        """Segment one response; None if that cannot be done."""
        found = [(start, trees[part]) for start, part in self.parts(text)]
        try:
            placed = [tree.shifted(start) for start, of_part in found if of_part is not None for tree in of_part]
            closes = closing_tokens(placed, text, spans, self.cutoff)
        except ValueError:
            return None
        return None if any(not of_part for _, of_part in found) else closes


_BACKENDS = "give Stanza(), Benepar(), or a callable from a text to its trees"


@dataclass(frozen=True)
class ConstituencyParse(ParseCondition):
    """Close at the ends of constituents of natural language.

    Sentences end behind `.`, `!` or `?` with space, and at line breaks; each is parsed once, in other processes.

    Attributes:
        cutoff: Tokens from which on a constituent is divided, at least 1.
        backend: `Stanza()`, `Benepar()`, or any callable from a text to `ParseTree`s (on the command line, a class
            derived from `Parser` or a function, by its dotted path).
        workers: Processes that parse, each with its own copy of the models; 0 parses in this one.

    Raises:
        ValueError: If a number is out of range.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2: cutoff 5, with benepar.
    """

    cutoff: int = 5
    backend: Parser | Parse = field(default_factory=Stanza)
    workers: int = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what does not parse."""
        super().__post_init__()
        if isinstance(self.backend, type | TerminationCondition) or not callable(self.backend):
            raise ValueError(f"backend is {self.backend!r}; {_BACKENDS}")
        if error := call_error(self.backend, ""):
            raise ValueError(
                f"backend is {self.backend!r}, which cannot be called with a text ({error}); {_BACKENDS}"
            ) from error

    @property
    def parser(self) -> Parser | Parse:
        """What makes the trees."""
        return self.backend

    def parts(self, text: str) -> list[tuple[int, str]]:
        """Divide a text into sentences."""
        bounds = [0, *(place for match in _SENTENCE_END.finditer(text) for place in match.span()), len(text)]
        spans = zip(bounds[::2], bounds[1::2], strict=True)
        return [(start, text[start:end]) for start, end in spans if text[start:end].strip()]


@dataclass(frozen=True)
class CodeParse(ParseCondition):
    """Close at the ends of constituents of a program: the same two rules on its syntax tree.

    A leaf of that tree is one word, however long: the text of a string, or a comment, extends the action before it.

    Attributes:
        cutoff: Tokens from which on a constituent is divided, at least 1.
        language: Of the package `tree_sitter_<language>`, such as python, c or rust.
        workers: Processes that parse; 0, for tree-sitter is quick, parses in this one.

    Raises:
        ValueError: If a number is out of range.

    Source:
        MA-RLHF (https://arxiv.org/abs/2410.02743), section 3.2, for programs; the cutoff is that of its n-grams there.
    """

    cutoff: int = 10
    language: str = "python"
    workers: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse languages that cannot be."""
        super().__post_init__()
        _ = self.parser

    @property
    def parser(self) -> Parser:
        """What makes the trees."""
        return TreeSitter(self.language)

    def parts(self, text: str) -> list[tuple[int, str]]:
        """Take a program as a whole."""
        return [(0, text)] if text.strip() else []
