"""Parsers of other libraries: a small model of Stanza trained here, trees of NLTK, syntax trees of programs."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import nltk
import pytest
from tokenizers.processors import TemplateProcessing

from apportion import Benepar, Stanza
from apportion.credit.parse import ParseTree, closing_tokens
from apportion.data.functions.tokenizer import code_tokenizer
from apportion.parsing.parsers import ParserUnavailable, nltk_tree, stanza_tree, with_special_tokens
from apportion.parsing.syntax import TreeSitter
from texts import NESTED, O6, spans_of, tree_over

SENTENCE = "The quick fox jumped over the lazy dog."
PIECES = ["The", " quick", " fox", " jumped", " over", " the", " lazy", " dog", "."]


def constituents(tree: ParseTree) -> set[tuple[int, int]]:
    """The word spans of a tree; labels and chains of single children are no matter."""
    return set(tree.nodes)


def words(tree: ParseTree, text: str) -> list[str]:
    return [text[start:end] for start, end in tree.words]


def test_a_trained_parser_of_stanza_gives_its_trees_with_characters(stanza: Stanza) -> None:
    text = f"{SENTENCE} It was not good."
    first, second = stanza(text)
    assert words(first, text) == ["The", "quick", "fox", "jumped", "over", "the", "lazy", "dog", "."]
    assert words(second, text) == ["It", "was", "not", "good", "."]
    assert constituents(first) == constituents(tree_over(NESTED, text))
    assert constituents(second) == constituents(
        tree_over((("It", ("was", "not", "good"), "."),), text[len(SENTENCE) :])
    )


@pytest.mark.parametrize(("cutoff", "sizes"), O6.items())
def test_o6_through_stanza(stanza: Stanza, cutoff: int, sizes: list[int]) -> None:
    """ma-rlhf.md O6, with the tree of a parser."""
    closes = closing_tokens(stanza(SENTENCE), SENTENCE, spans_of(PIECES), cutoff)
    ends = [place + 1 for place, close in enumerate(closes) if close]
    assert [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)] == sizes


def test_stanza_parses_many_texts_as_it_parses_each(stanza: Stanza) -> None:
    texts = [SENTENCE, "It was\n\nnot  good", "?! ... dog", "é", SENTENCE + "  The dog saw a film."]
    together = stanza.many(texts)
    assert [list(trees) for trees in together] == [list(stanza(text)) for text in texts]
    for text, trees in zip(texts, together, strict=True):
        assert "".join(word for tree in trees for word in words(tree, text)) == "".join(text.split())


def test_a_token_of_several_words_belongs_to_the_first_where_they_have_no_characters() -> None:
    """Spanish "dámelo" is one token of three words; Stanza gives characters to words that are cut out of it alone."""
    from stanza.models.common.doc import Document
    from stanza.models.constituency.tree_reader import read_trees

    token: list[dict[str, Any]] = [
        {"id": (1, 3), "text": "dámelo", "start_char": 0, "end_char": 6},
        *({"id": (n,), "text": word} for n, word in ((1, "da"), (2, "me"), (3, "lo"))),
        {"id": (4,), "text": "ya", "start_char": 7, "end_char": 9},
    ]
    sentence = Document([token], text="dámelo ya").sentences[0]
    (tree,) = read_trees("(ROOT (S (VP (V da) (P me) (P lo)) (A ya)))")
    sentence.constituency = tree
    assert stanza_tree(sentence).words == ((0, 6), (7, 9))
    (short,) = read_trees("(ROOT (S (V da)))")
    sentence.constituency = short
    with pytest.raises(ValueError, match="the parser's tree has 1 leaves; the sentence has 4 words"):
        stanza_tree(sentence)


def test_trees_of_nltk_are_read() -> None:
    """The trees that benepar gives."""
    tree: Any = nltk.Tree.fromstring("(S (NP (DT The) (NN fox)) (VP (VBD ran)))")
    read = nltk_tree(tree, [(0, 3), (4, 7), (8, 11)])
    assert constituents(read) == {(0, 3), (0, 2), (0, 1), (1, 2), (2, 3)}
    with pytest.raises(ValueError, match=r"more leaves than the sentence has words \(2\)"):
        nltk_tree(tree, [(0, 3), (4, 7)])


def test_special_tokens_are_put_around_ids_as_benepar_asks_for() -> None:
    tokenizer = code_tokenizer()
    assert with_special_tokens(tokenizer, [-100, 6]) == [tokenizer.bos_token_id, -100, 6]
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A </s> </s>", special_tokens=[end])
    assert with_special_tokens(tokenizer, [-100]) == [end[1], -100, end[1], end[1]]


def test_models_and_packages_that_are_missing_are_told_with_the_command_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "benepar", None)  # cannot be imported, installed or not
    with pytest.raises(ParserUnavailable, match=r"no models for 'en' .* download them: python -c .*stanza.download"):
        Stanza(model_dir=str(tmp_path)).load()
    with pytest.raises(ParserUnavailable, match=r"benepar cannot be imported .*: pip install 'apportion\[benepar\]'"):
        Benepar().load()
    with pytest.raises(ParserUnavailable, match=r"programs in 'c_sharp' cannot .* pip install .*tree-sitter-c-sharp"):
        TreeSitter("c_sharp").load()


def test_a_program_is_read_to_its_last_character() -> None:
    """Escapes are children of a string, and what lies between them is no node of tree-sitter's own."""
    text = "def f(x):\n    return 'é\\n ü'  # go\n"
    (tree,) = TreeSitter()(text)
    assert words(tree, text) == ["def", "f", "(", "x", ")", ":", "return", "'", "é", "\\n", "ü", "'", "# go"]


@pytest.mark.parametrize("text", ["def f(x:\n  y = [1, 2\nreturn (('", "))) = = 'x", "    x = 1\n  else:", "a b c"])
def test_broken_code_has_a_tree_of_all_that_it_says(text: str) -> None:
    (tree,) = TreeSitter()(text)
    assert "".join(words(tree, text)).replace(" ", "") == "".join(text.split())
    assert len(tree.nodes) > len(tree.words)


def test_a_text_without_words_has_no_tree() -> None:
    assert not TreeSitter()(" \n\n")


def test_real_programs_are_read_to_their_last_character(shared: Path) -> None:
    with gzip.open(shared / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        programs = [row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines)]
    for text in [*programs, *(text[: len(text) // 2] for text in programs)]:
        (tree,) = TreeSitter()(text)
        assert "".join("".join(words(tree, text)).split()) == "".join(text.split())
