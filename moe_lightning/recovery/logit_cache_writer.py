"""Writing a cache of predictions (:mod:`moe_lightning.recovery.logit_cache`) so that a process that dies loses little.

Legend: B blocks of a batch, S tokens of a block, V vocabulary, K words kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from moe_lightning.files import check_writable, write_atomically
from moe_lightning.recovery.logit_cache import (
    HEADER,
    VERSION,
    CacheHeader,
    block_hashes,
    dtype_of,
    is_cache,
    mass_of,
    open_shard,
    read_header,
    shard_paths,
    top_words,
)

MAX_SHARD_BYTES = 256 * 2**20


class LogitCacheWriter:
    """Writes predictions, shard by shard; each shard is there whole or not at all.

    A writer that was killed goes on where it was: of what it had not yet written it knows nothing, all else it finds::

        with LogitCacheWriter(folder, header) as writer:
            for batch in batches:
                new = ~writer.holds(batch["input_ids"])
                ...
                writer.add(input_ids, logits)

    Args:
        folder: Folder to write, or to add to.
        header: What it will hold.
        max_shard_bytes: Largest size of a file, in bytes; also about half of the memory that the writer takes.
        overwrite: Delete the cache that is there.

    Raises:
        FileExistsError: The folder holds something else.
        ValueError: It is a cache of something else, or a file of it is damaged.
        PermissionError: It cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        header: CacheHeader,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.header = Path(folder), header
        check_cache_folder(self.folder, header, overwrite)
        if overwrite:
            for path in [self.folder / HEADER, *shard_paths(self.folder)]:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".*.partial"):
            path.unlink(missing_ok=True)  # of a writer that was killed
        self._blocks_per_shard = max(1, max_shard_bytes // header.bytes_per_block)
        paths = shard_paths(self.folder)
        shards = [open_shard(path) for path in paths]
        self._known = {bytes(row) for shard in shards for row in shard["hash"].numpy()}
        self._written_mass = sum(mass_of(shard["rest"]) for shard in shards)
        self._next_shard = 1 + max((int(path.stem.partition("-")[2]) for path in paths), default=-1)
        self._waiting: list[dict[str, Tensor]] = []
        self._write_header(len(self._known))

    def __len__(self) -> int:
        """Blocks that are cached, those that wait for their shard included."""
        return len(self._known)

    def holds(self, input_ids: Tensor) -> np.ndarray:
        """Say which blocks need no prediction any more.

        Args:
            input_ids: ``[B, S]``.

        Returns:
            bool ``[B]``.
        """
        return np.array([row.tobytes() in self._known for row in block_hashes(input_ids)], bool)

    def add(self, input_ids: Tensor, logits: Tensor) -> None:
        """Add the predictions of blocks; those that are there already are left out.

        Args:
            input_ids: ``[B, S]``.
            logits: ``[B, S, V]``.

        Raises:
            ValueError: Sizes other than the header says, or a prediction that is not finite.
        """
        if logits.shape != (*input_ids.shape, self.header.vocab_size) or input_ids.shape[1] != self.header.block_size:
            raise ValueError(
                f"the cache takes blocks of {self.header.block_size} tokens and {self.header.vocab_size} words, got "
                f"tokens {list(input_ids.shape)} and logits {list(logits.shape)}"
            )
        if not bool(logits.isfinite().all()):
            raise ValueError("the teacher's predictions are not finite: nothing of this batch was written")
        cut = top_words(logits, self.header.top_k, self.header.temperature)
        first_BS1 = cut.log_probability[..., :1]
        relative = (cut.log_probability - first_BS1).to(dtype_of(self.header.storage))
        # Of what is read, with its rounding: so that it adds up to 1.
        rest_BS1 = cut.rest[..., None] - first_BS1
        total_BS = torch.cat([relative.float(), rest_BS1.float()], -1).logsumexp(-1)
        parts = {"first": -total_BS, "relative": relative, "rest": rest_BS1[..., 0].float() - total_BS}
        parts = {name: part.cpu() for name, part in parts.items()}
        # torch converts to unsigned integers by way of numpy only.
        integer = np.uint16 if self.header.vocab_size <= 1 << 16 else np.int32
        parts["words"] = torch.from_numpy(cut.words.cpu().numpy().astype(integer))
        for row, digest in enumerate(block_hashes(input_ids)):
            if digest.tobytes() not in self._known:
                self._known.add(digest.tobytes())
                block = {name: part[row] for name, part in parts.items()}
                self._waiting.append({"hash": torch.from_numpy(digest.view(np.uint8).copy()), **block})
        while len(self._waiting) >= self._blocks_per_shard:
            self._write_shard()

    def close(self) -> None:
        """Write what waits."""
        while self._waiting:
            self._write_shard()

    def __enter__(self) -> LogitCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was computed before an interruption is as good as ever.
        self.close()

    def _write_shard(self) -> None:
        blocks, self._waiting = self._waiting[: self._blocks_per_shard], self._waiting[self._blocks_per_shard :]
        tensors = {name: _stacked([block[name] for block in blocks]) for name in blocks[0]}
        path = self.folder / f"predictions-{self._next_shard:05}.safetensors"
        write_atomically(path, save(tensors, {"format": "pt"}))
        self._next_shard += 1
        self._written_mass += mass_of(tensors["rest"])
        self._write_header(len(self._known) - len(self._waiting))

    def _write_header(self, blocks: int) -> None:
        mass = self._written_mass / (blocks * self.header.block_size) if blocks else None
        self.header = replace(self.header, kept_mass=mass)
        entries = {"version": VERSION, "blocks": blocks, "bytes_per_block": self.header.bytes_per_block}
        write_atomically(self.folder / HEADER, json.dumps(entries | asdict(self.header), indent=2) + "\n")


def _stacked(blocks: list[Tensor]) -> Tensor:
    if blocks[0].dtype == torch.uint16:
        return torch.stack([block.view(torch.int16) for block in blocks]).view(torch.uint16)
    return torch.stack(blocks)


def check_cache_folder(folder: str | os.PathLike[str], header: CacheHeader, overwrite: bool) -> None:
    """Make sure that predictions can be written to a folder, before they are made.

    Args:
        folder: The folder.
        header: What is to be written.
        overwrite: Whether a cache of something else may be deleted.

    Raises:
        FileExistsError: The folder holds something that is no cache, or is a file.
        ValueError: It is a cache of something else, and ``overwrite`` is not set.
        PermissionError: It cannot be written.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder: choose another output")
    check_writable(target / HEADER)
    if is_cache(target):
        if not overwrite:
            read_header(target).check_same(header, target)
    elif target.is_dir() and any(_strangers(target)):
        raise FileExistsError(f"{target} holds something that is no cache of predictions: choose another folder")


def _strangers(folder: Path) -> Iterator[Path]:
    # A writer that was killed may have left half of its first header.
    return (path for path in folder.iterdir() if not path.name.endswith(".partial"))
