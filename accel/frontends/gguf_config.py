"""The configuration in a GGUF file, translated by `transformers`, without its vocabulary.

`transformers` (through the package `gguf`) makes several arrays for each token and each merge of
the vocabulary, a hundred thousand of them: seconds, for a few numbers. So it is given a copy of
the header without these lists, in a file that has holes where the tensors are.
"""

from __future__ import annotations

import importlib
import struct
import tempfile
from pathlib import Path
from typing import Any

from accel.frontends.gguf import GgufFile

_LISTS = ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
_NAME = "header.gguf"
_UINT32 = 4


def read_config(file: GgufFile) -> Any:
    """The model's configuration. Raises whatever transformers makes of a strange one."""
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory(prefix="accel-") as folder:
        with (Path(folder) / _NAME).open("wb") as stream:
            header = _short_header(file)
            stream.write(header)
            stream.truncate(len(header) + file.alignment + file.size - file.start)
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=_NAME)
    config.name_or_path = str(file.path.parent)
    return config


def _short_header(file: GgufFile) -> bytes:
    """The header with the number of tokens instead of the tokens."""
    architecture = str(file.metadata["general.architecture"])
    dropped = {f"tokenizer.ggml.{name}" for name in _LISTS}
    added: list[bytes] = []
    size = f"{architecture}.vocab_size"
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not _knows_size(architecture):  # transformers counts the tokens themselves
        dropped.remove("tokenizer.ggml.tokens")
    elif size not in file.metadata and isinstance(tokens, list):
        key = size.encode()
        added = [struct.pack("<Q", len(key)), key, struct.pack("<II", _UINT32, len(tokens))]
    with file.path.open("rb") as stream:
        whole = stream.read(file.start)
    kept = [whole[slice(*span)] for key, span in file.pairs.items() if key not in dropped]
    counts = struct.pack("<QQ", len(file.tensors), len(kept) + bool(added))
    return b"".join([whole[:8], counts, *kept, *added, whole[slice(*file.table)]])


def _knows_size(architecture: str) -> bool:
    """Whether transformers reads this architecture's size of the vocabulary from the header."""
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    known = reader.GGUF_TO_TRANSFORMERS_MAPPING["config"].get(architecture, {})
    return "vocab_size" in known
