"""Which bytes of a decoded text each token of a given id sequence stands for.

The ids are those that were sampled: tokenising the text again gives the canonical ones, which need not be the same. A
tokenizer does not say how its decoder joins tokens, so the joining rules in use are tried in turn, and one is accepted
only if it rebuilds the decoded text to the byte. Where none does, spans come from decoding every prefix, which takes
time that grows with the square of the length.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise

from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Start and end, in bytes of a UTF-8 text."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd".encode()


def token_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Span]:
    """Find the bytes of the decoded text that each token stands for.

    Args:
        tokenizer: Any, of any joining rule: byte-level, sentencepiece with byte fallback, words joined by spaces.
        ids: Token ids exactly as sampled, canonical or not.

    Returns:
        One span a token, in order and without gaps: a space between words belongs to the word after it. Empty on
        special tokens, which the decoded text leaves out. The spans cover the text that
        `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)` gives.
    """
    return decode_with_spans(tokenizer, ids, special_ids(tokenizer))[1]


def decode_with_spans(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: frozenset[int]
) -> tuple[bytes, list[Span]]:
    """Decode ids without special tokens, and say which bytes each token stands for.

    Args:
        tokenizer: As for `token_spans`.
        ids: As for `token_spans`.
        special: What `special_ids` says of the tokenizer, found once for many rows.

    Returns:
        The text in UTF-8, and one span a token.
    """
    data = _decode(tokenizer, ids)
    tokens = ["" if token in special else name for token, name in zip(ids, _names(tokenizer, ids), strict=True)]
    for pieces in _joinings(tokenizer, ids, tokens):
        if (fitted := _fitted(pieces, data)) is not None:
            return data, list(pairwise(accumulate(map(len, fitted), initial=0)))
    return data, _prefix_spans(tokenizer, ids, data)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that decoding leaves out: beginning and end of text, padding, turns of a chat."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


def byte_spans(text: str, offsets: Sequence[Span], tokens: Sequence[str]) -> list[Span]:
    """Turn a fast tokenizer's character offsets into bytes.

    Tokens that share a character are all given the whole of it by the tokenizer. Where their own bytes add up to what
    they share, each gets its own.

    Args:
        text: What was tokenised.
        offsets: Start and end of each token, in characters.
        tokens: Names of the tokens, as `convert_ids_to_tokens` gives them.

    Returns:
        One span a token, in bytes of the text.
    """
    if text.isascii():
        return list(offsets)
    table = [0, *accumulate(len(character.encode()) for character in text)]
    spans = [(table[start], table[end]) for start, end in offsets]
    first = 0
    while first < len(spans):
        last, end = first + 1, spans[first][1]
        while last < len(spans) and spans[last][0] < end and spans[last][1] > spans[last][0]:
            end = max(end, spans[last][1])
            last += 1
        if last - first > 1:
            spans[first:last] = _shares(spans[first:last], tokens[first:last])
        first = last
    return spans


def byte_level_pieces(tokens: Sequence[str]) -> list[bytes]:
    """Undo byte-level BPE's alphabet, in which each character of a token is one byte (GPT-2)."""
    return [
        bytes(_BYTES[character] for character in token) if all(c in _BYTES for c in token) else token.encode()
        for token in tokens
    ]


def byte_fallback_pieces(tokens: Sequence[str]) -> list[bytes]:
    """Undo sentencepiece's marks: U+2581 for a space, `<0x41>` for a byte without a token of its own."""
    matches = [_BYTE_TOKEN.fullmatch(token) for token in tokens]
    return [
        bytes([int(match[1], 16)]) if match else token.replace("\u2581", " ").encode()
        for match, token in zip(matches, tokens, strict=True)
    ]


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's table from characters to bytes: printable ones are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bytes:
    """Decode ids as they are joined, without special tokens and without tidying spaces."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return "".join(text).encode()


def _names(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the tokens' names; an id beyond the vocabulary (of a padded output layer) has none, and no text."""
    return [name or "" for name in tokenizer.convert_ids_to_tokens(list(ids))]


def _shares(spans: list[Span], tokens: Sequence[str]) -> list[Span]:
    """Divide what tokens share by their own bytes, if these add up to it."""
    start, end = spans[0][0], max(span[1] for span in spans)
    for pieces in (byte_level_pieces(tokens), byte_fallback_pieces(tokens)):
        bounds = list(accumulate(map(len, pieces), initial=start))
        if bounds[-1] == end:
            return list(pairwise(bounds))
    return spans


def _joinings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], tokens: Sequence[str]) -> Iterator[list[bytes]]:
    """Try one rule after the other, the frequent and quick ones first."""
    yield _lossy(byte_level_pieces(tokens))
    yield _fallback(tokens)
    yield _words(tokens)
    yield _one_by_one(tokenizer, ids, tokens)


def _fitted(pieces: list[bytes], data: bytes) -> list[bytes] | None:
    """Return pieces that join to the data, where need be without the space that decoders strip from the beginning."""
    joined = b"".join(pieces)
    if joined == data:
        return pieces
    if joined != b" " + data:
        return None
    first = next(place for place, piece in enumerate(pieces) if piece)
    return [*pieces[:first], pieces[first][1:], *pieces[first + 1 :]]


def _lossy(pieces: list[bytes]) -> list[bytes]:
    """Put U+FFFD in the place of bytes that are no character, as decoding does."""
    raw = b"".join(pieces)
    ends = [0, *accumulate(_decoded_widths(raw))]
    bounds = [ends[end] for end in accumulate(map(len, pieces), initial=0)]
    text = raw.decode(errors="replace").encode()
    return [text[start:end] for start, end in pairwise(bounds)]


def _decoded_widths(raw: bytes) -> list[int]:
    """Say how many bytes of the decoded text each raw byte makes; the bytes of a bad sequence share one U+FFFD."""
    widths, place = [1] * len(raw), 0
    while place < len(raw):
        try:
            raw[place:].decode()
        except UnicodeDecodeError as error:
            count, total = error.end - error.start, len(_REPLACEMENT)
            shares = [total * (step + 1) // count - total * step // count for step in range(count)]
            widths[place + error.start : place + error.end] = shares
            place += error.end
        else:
            break
    return widths


def _fallback(tokens: Sequence[str]) -> list[bytes]:
    """Join as sentencepiece: a run of byte tokens that is no text becomes one U+FFFD a token."""
    pieces: list[bytes] = []
    for in_run, group in groupby(tokens, key=lambda token: not token or bool(_BYTE_TOKEN.fullmatch(token))):
        run = list(group)
        raw = byte_fallback_pieces(run)
        valid = not in_run or b"".join(raw).decode(errors="ignore").encode() == b"".join(raw)
        pieces += raw if valid else [_REPLACEMENT if token else b"" for token in run]
    return pieces


def _words(tokens: Sequence[str]) -> list[bytes]:
    """Join words by spaces, each space with the word after it."""
    first = next((place for place, token in enumerate(tokens) if token), len(tokens))
    return [(" " * (place > first) + token).encode() if token else b"" for place, token in enumerate(tokens)]


def _one_by_one(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], tokens: Sequence[str]) -> list[bytes]:
    """Join each token as the decoder joins it to the first, whatever stands between them (WordPiece)."""
    places = [place for place, token in enumerate(tokens) if token]
    pieces = [b""] * len(tokens)
    if places:
        first = ids[places[0]]
        opening = _decode(tokenizer, [first])
        joined = {number: _decode(tokenizer, [first, number])[len(opening) :] for number in {*ids}}
        for place in places[1:]:
            pieces[place] = joined[ids[place]]
        pieces[places[0]] = opening
    return pieces


def _prefix_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], data: bytes) -> list[Span]:
    """End each token where decoding the ids up to it stops to agree with the whole text."""
    decoded = (_decode(tokenizer, ids[:last]) for last in range(1, len(ids)))
    agreed = [*(_agreement(prefix, data) for prefix in decoded), *[len(data)] * bool(ids)]
    return list(pairwise(accumulate(agreed, max, initial=0)))


def _agreement(one: bytes, other: bytes) -> int:
    """Count the bytes with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
