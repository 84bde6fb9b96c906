"""Parsers: from a text to trees with character spans. Their packages are imported when they are loaded."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib import import_module
from typing import Any

from apportion.credit.parse import ParseTree, Span

Parse = Callable[[str], Sequence[ParseTree]]
"""What a parser is: any callable from a text to the trees of its sentences, in order, with spans in that text."""


class ParserUnavailable(ValueError):
    """A parser cannot be loaded; the message says how to install it."""


@dataclass(frozen=True)
class Parser(ABC):
    """Parse text; derive from it to choose a parser by name on the command line."""

    @abstractmethod
    def load(self) -> None:
        """Load everything that parsing needs.

        Raises:
            ParserUnavailable: If a package or a model is missing; it says how to install it.
        """

    @abstractmethod
    def __call__(self, text: str) -> Sequence[ParseTree]:
        """Parse a text.

        Args:
            text: Any, also cut off or without sense.

        Returns:
            The trees of its sentences, in order, with spans in this text.

        Raises:
            ValueError: If the trees cannot be laid over the text.
        """

    def many(self, texts: Sequence[str]) -> list[Sequence[ParseTree]]:
        """Parse several texts, at once where that is quicker."""
        return [self(text) for text in texts]

    def __getstate__(self) -> dict[str, Any]:
        """Send the settings alone to another process, which loads for itself."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Stanza(Parser):
    """The constituency parser of Stanza, with its own tokeniser and sentence splitter.

    Attributes:
        language: Code of the language.
        model_dir: Folder of the models; None for Stanza's own choice.
        use_gpu: Whether each worker process puts the models on the GPU.
        options: Further arguments of `stanza.Pipeline`, such as `constituency_model_path`.

    Source:
        Qi et al., 2020 (https://arxiv.org/abs/2003.07082); the constituency parser since Stanza 1.3.
    """

    language: str = "en"
    model_dir: str | None = None
    use_gpu: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @cached_property
    def _pipeline(self) -> Any:
        stanza = _imported("stanza", "pip install 'apportion[parsing]'")
        folder = {} if self.model_dir is None else {"dir": self.model_dir}
        settings: dict[str, Any] = {"processors": "tokenize,pos,constituency", "download_method": None}
        settings |= {"verbose": False, "use_gpu": self.use_gpu} | folder | self.options
        try:
            return stanza.Pipeline(self.language, **settings)
        except (OSError, ValueError) as error:
            where = "" if self.model_dir is None else f", model_dir={self.model_dir!r}"
            call = f"stanza.download({self.language!r}, processors='tokenize,pos,constituency'{where})"
            raise ParserUnavailable(
                f"Stanza has no models for {self.language!r} that it can read ({error}); download them: "
                f'python -c "import stanza; {call}"'
            ) from error

    def load(self) -> None:
        """Load the models."""
        _ = self._pipeline

    def __call__(self, text: str) -> Sequence[ParseTree]:
        """Parse a text."""
        return self.many([text])[0]

    def many(self, texts: Sequence[str]) -> list[Sequence[ParseTree]]:
        """Parse several texts at once."""
        documents = self._pipeline.bulk_process(list(texts))
        return [[stanza_tree(sentence) for sentence in document.sentences] for document in documents]


@dataclass(frozen=True)
class Benepar(Parser):
    """The Berkeley neural parser, which MA-RLHF uses, with spaCy's rules for words and sentences.

    Attributes:
        model: Name of a downloaded model, or path to one.
        language: Code of the language of spaCy's rules.

    Source:
        Kitaev et al., 2019 (https://arxiv.org/abs/1812.11760).
    """

    model: str = "benepar_en3"
    language: str = "en"

    @cached_property
    def _models(self) -> tuple[Any, Any, Any]:
        benepar, spacy = (_imported(name, "pip install 'apportion[benepar]'") for name in ("benepar", "spacy"))
        from transformers import PreTrainedTokenizerBase  # here, for a process that parses begins ten times sooner so

        if not hasattr(PreTrainedTokenizerBase, "build_inputs_with_special_tokens"):
            # benepar 0.2, the last there is, calls it; transformers 5 has it no more.
            setattr(PreTrainedTokenizerBase, "build_inputs_with_special_tokens", with_special_tokens)  # noqa: B010
        words = spacy.blank(self.language)
        words.add_pipe("sentencizer")
        try:
            return words, benepar.InputSentence, benepar.Parser(self.model)
        except (LookupError, OSError) as error:
            raise ParserUnavailable(
                f"benepar has no model {self.model!r} that it can read; download it: "
                f'python -c "import benepar; benepar.download({self.model!r})"'
            ) from error

    def load(self) -> None:
        """Load the model."""
        _ = self._models

    def __call__(self, text: str) -> Sequence[ParseTree]:
        """Parse a text."""
        words, sentence, parser = self._models
        said = [[word for word in part if not word.is_space] for part in words(text).sents]
        said = [part for part in said if part]
        given = [
            sentence(words=[word.text for word in part], space_after=[bool(word.whitespace_) for word in part])
            for part in said
        ]
        spans = [[(word.idx, word.idx + len(word.text)) for word in part] for part in said]
        return [nltk_tree(tree, part) for tree, part in zip(parser.parse_sents(given), spans, strict=True)]


def with_special_tokens(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Put the special tokens of a tokenizer around the ids of a text, as transformers 4 did.

    Args:
        tokenizer: Any that is fast.
        ids: Those of a text.

    Returns:
        The ids with what the tokenizer puts before and behind a text.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    given, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return [*given[:first], *ids, *given[last:]]


def stanza_tree(sentence: Any) -> ParseTree:
    """Read a sentence of Stanza.

    Args:
        sentence: A `stanza.models.common.doc.Sentence` with a constituency tree. A word of a multi-word token that has
            no characters of its own is left out; the first word of such a token stands for all of it.

    Returns:
        Its tree, with spans in the text of the document.

    Raises:
        ValueError: If the tree has other leaves than the sentence has words.
    """
    spans: list[Span] = []
    for token in sentence.tokens:
        own = [word.start_char is not None and word.end_char is not None for word in token.words]
        whole = [(token.start_char, token.end_char)] + [(token.end_char, token.end_char)] * (len(own) - 1)
        spans += [(word.start_char, word.end_char) for word in token.words] if all(own) else whole
    return _over(sentence.constituency, lambda node: node.children, spans)


def nltk_tree(tree: Any, spans: Sequence[Span]) -> ParseTree:
    """Read a tree of NLTK, as benepar gives it.

    Args:
        tree: An `nltk.Tree`; its leaves are strings.
        spans: Characters of each leaf.

    Returns:
        The tree with these spans.

    Raises:
        ValueError: If the tree has another number of leaves.
    """
    return _over(tree, lambda node: () if isinstance(node, str) else list(node), spans)


def _over(root: Any, children: Callable[[Any], Sequence[Any]], spans: Sequence[Span]) -> ParseTree:
    """Lay a tree over words, leaf by leaf."""
    left = iter(spans)
    try:
        tree = ParseTree.of(root, children=children, span=lambda _: next(left))
    except StopIteration:
        raise ValueError(f"the parser's tree has more leaves than the sentence has words ({len(spans)})") from None
    if (extra := len(list(left))) > 0:
        raise ValueError(f"the parser's tree has {len(spans) - extra} leaves; the sentence has {len(spans)} words")
    return tree


def _imported(name: str, remedy: str) -> Any:
    """Import a package that only parsing needs."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ParserUnavailable(f"{name} cannot be imported ({error}); install it: {remedy}") from error
