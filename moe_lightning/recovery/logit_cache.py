"""A teacher's predictions on disk, cut to its likeliest words, so that recovery does not hold two models.

A cache is a folder::

    cache.json                      what it holds, and whose predictions they are
    predictions-00000.safetensors   blocks: hash [N, 16], first [N, S], relative [N, S, K], words [N, S, K], rest [N, S]
    predictions-00001.safetensors   ...

A block is found by a hash of its tokens, so that neither order nor batch size matter. Of each token the K likeliest
words are kept in falling order, each by how far its log-probability lies below that of the likeliest, in 16 bits, which
are precise there where the mass is; the log-probabilities of the likeliest and of all others together are float32, and
such that what is read adds up to 1. On a trained model with 2,048 words, K 64 and temperatures 1 and 2, this float16
changed the KL divergence by less than 4e-7 nats and its gradient by 3e-4 and 5e-4 of its length (plain
log-probabilities in float16: 7e-4 and 2e-3; in bfloat16: 5e-3 and 2e-2).

Legend: N blocks of a shard, B blocks of a batch, S tokens of a block, V vocabulary, K words kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lightning.recovery.objective import TopWords
from moe_lightning.statistics.fingerprint import same_weights

HEADER = "cache.json"
VERSION = 1
HASH_BYTES = 16
LITTLE_MASS = 0.9
"""Below that share of the probability more words are worth their place."""
TENSORS = ("hash", "first", "relative", "words", "rest")

Storage = Literal["float16", "float32"]


@dataclass(frozen=True)
class CacheHeader:
    """What a cache holds.

    Attributes:
        vocab_size: Words that the teacher knows.
        block_size: Tokens of a block.
        top_k: Words kept of each prediction.
        temperature: By which predictions were softened before they were cut.
        storage: Type of the log-probabilities.
        teacher: Whose predictions they are: ``folder`` and ``fingerprint`` (:func:`fingerprint` of its weights).
        data: Which text; plain values for people.
        kept_mass: Mean probability of the kept words together, at the temperature; None where nobody looked.

    Raises:
        ValueError: A number out of its range.
    """

    vocab_size: int
    block_size: int
    top_k: int
    temperature: float
    storage: Storage = "float16"
    teacher: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    kept_mass: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.top_k <= self.vocab_size:
            raise ValueError(f"top_k must lie between 1 and the vocabulary's {self.vocab_size} words, got {self.top_k}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.storage not in ("float16", "float32"):
            raise ValueError(f"storage must be float16 or float32, got {self.storage!r}")

    @property
    def coverage(self) -> str:
        """How much the kept words cover, in words, with what to do where that is little; nothing where unknown."""
        if self.kept_mass is None:
            return ""
        words = f"the {self.top_k} likeliest words cover {self.kept_mass:.0%} of the teacher's probability on average"
        words = words.replace("%", " %")
        return words if self.kept_mass >= LITTLE_MASS else f"{words}: a larger --top_k covers more"

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block on disk."""
        word_bytes = 2 if self.vocab_size <= 1 << 16 else 4
        return self.block_size * (self.top_k * (dtype_of(self.storage).itemsize + word_bytes) + 8) + HASH_BYTES

    def check_same(self, other: CacheHeader, folder: Path) -> None:
        """Make sure that predictions can stand in one folder.

        Args:
            other: Of those that come; without a fingerprint the teacher is not compared.
            folder: For the message.

        Raises:
            ValueError: They differ in more than their text.
        """
        names = ("vocab_size", "block_size", "top_k", "temperature", "storage")
        wrong = [
            f"{name} {getattr(self, name)}, not {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        theirs = other.teacher.get("fingerprint")
        if theirs is not None and not same_weights(self.teacher.get("fingerprint", ()), theirs):
            wrong.append(f"predictions of another teacher ({self.teacher.get('folder', 'unknown')})")
        if wrong:
            raise ValueError(f"{folder} is a cache with {', '.join(wrong)}: choose another folder, or overwrite it")


def dtype_of(storage: Storage) -> torch.dtype:
    """Return torch's name of a type."""
    return torch.float16 if storage == "float16" else torch.float32


def is_cache(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder is a cache of predictions."""
    return (Path(folder) / HEADER).is_file()


def read_header(folder: str | os.PathLike[str]) -> CacheHeader:
    """Read what a cache holds.

    Raises:
        FileNotFoundError: The folder is no cache.
        ValueError: Its header is damaged, or of another version.
    """
    path = Path(folder) / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of cached predictions: it has no {HEADER}")
    try:
        entries = json.loads(path.read_text())
        version = entries.pop("version")
        entries.pop("blocks")
        entries.pop("bytes_per_block")
        if version != VERSION:
            raise ValueError(f"it is of version {version}, and this program reads {VERSION}")
        return CacheHeader(**entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): write the cache anew") from None


def block_hashes(input_ids: Tensor) -> np.ndarray:
    """Return a hash of every block's tokens.

    Args:
        input_ids: ``[B, S]``, of any integer type, on any device.

    Returns:
        uint64 ``[B, 2]``, the same on every machine.
    """
    rows = np.ascontiguousarray(input_ids.cpu().numpy(), dtype="<i8")
    digests = b"".join(hashlib.blake2b(row.data, digest_size=HASH_BYTES).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


def top_words(logits: Tensor, top_k: int, temperature: float) -> TopWords:
    """Cut predictions to their likeliest words.

    Args:
        logits: ``[..., V]``.
        top_k: Words to keep.
        temperature: By which they are softened first.

    Returns:
        The likeliest words in falling order; the log-probability of all others is minus infinity where none is left.
    """
    log_BSV = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    kept_BSK, words_BSK = log_BSV.topk(top_k, sorted=True)
    # Not 1 minus the others, of which rounding would leave nothing where a teacher is sure.
    rest_BS = log_BSV.scatter_(-1, words_BSK, -torch.inf).logsumexp(-1)
    return TopWords(kept_BSK, words_BSK, rest_BS)


def shard_paths(folder: Path) -> list[Path]:
    """Return the files of a cache that hold predictions, in order."""
    return sorted(folder.glob("predictions-*.safetensors"))


def mass_of(rest: Tensor) -> float:
    """Return the probability of kept words, added up over predictions.

    Args:
        rest: Log-probability of all other words, any shape.
    """
    return float(-rest.double().expm1().sum())


def open_shard(path: Path) -> dict[str, Tensor]:
    """Open a file of predictions by memory map: what is not looked at stays on disk.

    Raises:
        ValueError: It is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and write the missing blocks again") from None


class _Index:
    """Where each block stands, by its hash."""

    def __init__(self, hashes: list[np.ndarray]) -> None:
        every = np.concatenate([np.zeros((0, 2), np.uint64), *hashes])
        self._order = np.lexsort((every[:, 1], every[:, 0]))
        self._sorted = every[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return the number of each block, -1 where it is not there."""
        found = np.full(len(hashes), -1)
        places = np.searchsorted(self._sorted[:, 0], hashes[:, 0])
        for row, (place, wanted) in enumerate(zip(places, hashes, strict=True)):
            while place < len(self) and self._sorted[place, 0] == wanted[0]:
                if self._sorted[place, 1] == wanted[1]:
                    found[row] = self._order[place]
                    break
                place += 1
        return found


class LogitCache:
    """Cached predictions, read by memory map.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: It is no cache.
        ValueError: One of its files is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.header = read_header(folder)
        self._shards = [open_shard(path) for path in shard_paths(self.folder)]
        self._index = _Index([_words_of(shard["hash"]) for shard in self._shards])
        self._starts = np.cumsum([0, *(len(shard["hash"]) for shard in self._shards)])

    def __len__(self) -> int:
        """Blocks that are cached."""
        return len(self._index)

    def holds(self, input_ids: Tensor) -> np.ndarray:
        """Say which blocks are there.

        Args:
            input_ids: ``[B, S]``.

        Returns:
            bool ``[B]``.
        """
        return self._index.find(block_hashes(input_ids)) >= 0

    def look_up(self, input_ids: Tensor) -> TopWords:
        """Return the predictions of blocks, on the device of their tokens.

        Args:
            input_ids: ``[B, S]``.

        Raises:
            ValueError: A block is not there.

        Cost: about 5 us for a block of 256 tokens to find it, and the copy of its predictions.
        """
        if input_ids.shape[1] != self.header.block_size:
            raise ValueError(
                f"{self.folder} holds predictions of blocks of {self.header.block_size} tokens, and a batch has blocks "
                f"of {input_ids.shape[1]}: set --data.block_size as it was for moe-lightning cache-logits"
            )
        numbers = self._index.find(block_hashes(input_ids))
        if (numbers < 0).any():
            raise ValueError(
                f"{(numbers < 0).sum()} of the {len(numbers)} blocks of a batch are not among the {len(self):,} that "
                f"{self.folder} holds predictions of: write more with 'moe-lightning cache-logits --output "
                f"{self.folder}', the data options of this run, and enough --steps"
            )
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        rows = [
            (self._shards[place], int(number - self._starts[place]))
            for place, number in zip(places, numbers, strict=True)
        ]
        first, relative, words, rest = (
            torch.stack([_readable(shard[name][row]) for shard, row in rows]).to(input_ids.device)
            for name in TENSORS[1:]
        )
        words = words.long() & 0xFFFF if words.dtype == torch.int16 else words.long()
        return TopWords(relative.float() + first[..., None], words, rest)


def _readable(values: Tensor) -> Tensor:
    # There is little that torch does with unsigned integers.
    return values.view(torch.int16) if values.dtype == torch.uint16 else values


def _words_of(hashes: Tensor) -> np.ndarray:
    return hashes.numpy().view("<u8").reshape(-1, 2)
