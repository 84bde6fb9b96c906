"""What problems and a model hold, recognised again when a measurement is resumed."""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from transformers.utils.hub import cached_file

from apportion.data.problems import Problem

MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.safetensors"),
)
"""What decides the responses of a model; a folder may hold the records of its training too."""

PIECE, PIECES = 4096, 16
"""Bytes of a piece of a tensor, and how many pieces of each are looked at, evenly spread."""


def digest_of_problems(problems: Iterable[Problem], *, asked: bool) -> str:
    """Recognise problems: their names, tests, difficulties and heads, in order; not their solutions.

    Args:
        problems: Any number.
        asked: Whether a model is given their prompts, which then are looked at too.

    Returns:
        Hexadecimal; equal where all of that is.
    """
    digest = sha256()
    for problem in problems:
        digest.update(json.dumps([problem.prompt if asked else "", problem.to_json()]).encode())
    return digest.hexdigest()[:16]


def digest_of_model(path: str) -> str:
    """Recognise a model: of the hub by its commit, of a folder by its files, of adapters with the model below them.

    Of weights the names, shapes and some pieces are read, so that it takes no time that counts.

    Args:
        path: A folder, or a name on the hub that `check_model` accepts.

    Returns:
        Hexadecimal; equal where the model is the same.
    """
    digest, folder = sha256(), Path(path)
    if not folder.is_dir():
        folder = _snapshot(path)
        digest.update(folder.name.encode())  # the commit
    else:
        for file in sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)}):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                for piece in _tensors(content) if file.suffix == ".safetensors" else [content.read()]:
                    digest.update(piece)
    if (below := _below(folder)) not in (None, path):
        digest.update(digest_of_model(str(below)).encode())
    return digest.hexdigest()[:16]


def _snapshot(name: str) -> Path:
    """Find the folder of a model of the hub in its cache; it is called after the commit."""
    for file in ("config.json", "adapter_config.json"):
        if found := cached_file(name, file, _raise_exceptions_for_missing_entries=False):
            return Path(found).parent
    raise FileNotFoundError(f"there is no model {name}: neither a folder nor a name on the hub")


def _below(folder: Path) -> str | None:
    """Name the model that adapters stand on."""
    file = folder / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None


def _tensors(content: BinaryIO) -> Iterable[bytes]:
    """Read the header of a safetensors file, and pieces of each tensor; of small ones all."""
    header = content.read(int.from_bytes(content.read(8), "little"))
    yield header
    start = content.tell()
    for name, tensor in json.loads(header).items():
        if name == "__metadata__":
            continue
        first, end = tensor["data_offsets"]
        for place in range(first, end, max(PIECE, (end - first) // PIECES)):
            content.seek(start + place)
            yield content.read(min(PIECE, end - place))
