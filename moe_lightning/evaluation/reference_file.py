"""What the uncompressed model makes of some text, in one file: so that a comparison with it needs no second model.

A safetensors file::

    likeliest/TEXT    [T]     the token that it finds the most likely behind each token, int64
    predictions/TEXT  [T, V]  log-probability of every next token, float32
    hidden/NUMBER     [T, H]  what leaves a block of the first text, float32, by its number in the original model

of the first tokens of each text, whole blocks of it, one block after the other. Its metadata hold, for each text, how
many tokens these are and a fingerprint of them, and for the file a fingerprint of the model's weights.

T tokens, S tokens of a block, V vocabulary, H hidden.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lightning.evaluation.comparison import Prediction, predictions_bytes

FORMAT, VERSION = "moe-lightning reference", "1"
_PARTIAL = ".{}.{}.partial"
"""What a file is called that is being written: its name, the process."""

_KINDS = {torch.float32: "F32", torch.int64: "I64"}


def token_fingerprint(blocks: Iterable[Tensor]) -> str:
    """Return a fingerprint of token ids, which does not depend on how the blocks stand in batches.

    Args:
        blocks: Token ids ``[B, S]``, batch after batch.
    """
    digest = hashlib.sha256()
    for ids in blocks:
        for row in ids.cpu().to(torch.int64).numpy().astype("<i8"):
            digest.update(f"{len(row)}:".encode() + row.tobytes())
    return digest.hexdigest()


def reference_bytes(
    prediction_tokens: int, vocab_size: int, hidden_tokens: int = 0, hidden_size: int = 0, num_blocks: int = 0
) -> int:
    """Say how large a file will be, but for its header of a few thousand bytes.

    Args:
        prediction_tokens: Tokens of all texts whose predictions it holds.
        vocab_size: V.
        hidden_tokens: Tokens whose hidden states it holds.
        hidden_size: H.
        num_blocks: Blocks that the model has.
    """
    return predictions_bytes(prediction_tokens, vocab_size) + 4 * hidden_tokens * hidden_size * num_blocks


@dataclass(frozen=True)
class ReferenceText:
    """Of which tokens of a text a file holds predictions.

    Attributes:
        tokens: How many, from its beginning.
        fingerprint: Of their ids, as :func:`token_fingerprint` makes it.
    """

    tokens: int
    fingerprint: str


class ReferenceWriter:
    """Write a file piece by piece; it takes its place as a whole when the ``with`` block ends well.

    Only one process writes a file at a time: pieces of it that a killed one left are removed.

    Args:
        path: The file; its folder is made.
        texts: What it will hold, by the name of the text.
        vocab_size: V.
        hidden_tokens: Tokens of the first text whose hidden states it will hold.
        hidden_size: H.
        blocks: Numbers of the model's blocks in the original model.
        weights: Fingerprint of the model's weights (:func:`moe_lightning.statistics.fingerprint.fingerprint`).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        texts: Mapping[str, ReferenceText],
        vocab_size: int,
        hidden_tokens: int,
        hidden_size: int,
        blocks: Sequence[int],
        weights: Sequence[float],
    ) -> None:
        self.path, self.texts, self.hidden_tokens = Path(path), dict(texts), hidden_tokens
        self._partial = self.path.with_name(_PARTIAL.format(self.path.name, os.getpid()))
        self._file: BinaryIO | None = None
        self._offsets: dict[str, int] = {}
        self._row_bytes: dict[str, int] = {}
        entries: dict[str, Any] = {}
        end = 0
        # Integers of 8 bytes first: everything behind them is aligned, too.
        shapes: dict[str, tuple[torch.dtype, list[int]]] = {}
        for name, text in texts.items():
            shapes[f"likeliest/{name}"] = torch.int64, [text.tokens]
        for name, text in texts.items():
            shapes[f"predictions/{name}"] = torch.float32, [text.tokens, vocab_size]
        for number in blocks if hidden_tokens else ():
            shapes[f"hidden/{number}"] = torch.float32, [hidden_tokens, hidden_size]
        for name, (dtype, shape) in shapes.items():
            self._row_bytes[name] = dtype.itemsize * (shape[1] if len(shape) == 2 else 1)
            self._offsets[name] = end
            size = shape[0] * self._row_bytes[name]
            entries[name] = {"dtype": _KINDS[dtype], "shape": shape, "data_offsets": [end, end + size]}
            end += size
        entries["__metadata__"] = {
            "format": FORMAT,
            "version": VERSION,
            "texts": json.dumps({name: [text.tokens, text.fingerprint] for name, text in texts.items()}),
            "weights": json.dumps(list(weights)),
        }
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self._size = len(self._header) + end
        self._written = 0
        self._expected = end

    def __enter__(self) -> ReferenceWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Those that were killed while they wrote left gigabytes behind that nobody would find.
        for left in self.path.parent.glob(_PARTIAL.format(glob.escape(self.path.name), "*")):
            left.unlink(missing_ok=True)
        self._file = self._partial.open("wb")
        self._file.write(self._header)
        return self

    def add_predictions(self, text: str, first_token: int, prediction: Prediction) -> None:
        """Write what the model says of tokens.

        Args:
            text: Name of the text.
            first_token: How many tokens of the text stand before them.
            prediction: Of so many tokens as come, ``[S, V]``.
        """
        self._write(f"likeliest/{text}", first_token, prediction.likeliest.long())
        self._write(f"predictions/{text}", first_token, prediction.log_probability.float())

    def add_hidden(self, first_token: int, outputs: Mapping[int, Tensor]) -> None:
        """Write what leaves each block at tokens of the first text.

        Args:
            first_token: How many tokens of the text stand before them.
            outputs: Hidden states ``[..., H]`` by the block's original number.
        """
        for number, states in outputs.items():
            self._write(f"hidden/{number}", first_token, states.reshape(-1, states.shape[-1]).float())

    def _write(self, name: str, first_row: int, values: Tensor) -> None:
        assert self._file is not None, "write inside of a with block"
        self._file.seek(len(self._header) + self._offsets[name] + first_row * self._row_bytes[name])
        data: Any = values.cpu().contiguous().numpy()
        self._written += self._file.write(memoryview(data).cast("B"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                if self._written != self._expected:
                    raise RuntimeError(f"{self.path}: {self._written} of {self._expected} bytes were written")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._partial, self.path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


class ReferenceFile:
    """A file that :class:`ReferenceWriter` wrote, read by memory map: what nobody looks at stays on disk.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            self._file = safe_open(str(self.path), framework="pt")
            metadata = self._file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                raise ValueError(f"it is no reference of version {VERSION}")
            texts: dict[str, list[Any]] = json.loads(metadata["texts"])
            self.texts = {name: ReferenceText(*values) for name, values in texts.items()}
            """What it holds of each text."""
            self.weights: list[float] = json.loads(metadata["weights"])
            """Fingerprint of the weights of the model that it comes from."""
            names = list(self._file.keys())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged or no reference of ours ({error})") from None
        self.blocks = sorted(int(name.partition("/")[2]) for name in names if name.startswith("hidden/"))
        """Blocks whose hidden states it holds, by their original numbers."""
        self.hidden_tokens = self._file.get_slice(f"hidden/{self.blocks[0]}").get_shape()[0] if self.blocks else 0
        """Tokens of the first text whose hidden states it holds."""

    def prediction(self, text: str, first_token: int, tokens: int) -> Prediction | None:
        """Return what the model said of tokens; None where the file does not hold all of them.

        Args:
            text: Name of the text.
            first_token: How many tokens of the text stand before them.
            tokens: S.

        Returns:
            Of tokens ``[S]``.
        """
        held = self.texts.get(text)
        last = first_token + tokens
        if held is None or last > held.tokens:
            return None
        log_probability, likeliest = (
            self._file.get_slice(f"{kind}/{text}")[first_token:last] for kind in ("predictions", "likeliest")
        )
        return Prediction(log_probability, likeliest)

    def hidden(self, first_token: int, tokens: int) -> dict[int, Tensor]:
        """Return what left each block at tokens of the first text, ``[S, H]``; nothing where not all are held.

        Args:
            first_token: How many tokens of the text stand before them.
            tokens: S.
        """
        last = first_token + tokens
        if last > self.hidden_tokens:
            return {}
        return {number: self._file.get_slice(f"hidden/{number}")[first_token:last] for number in self.blocks}
