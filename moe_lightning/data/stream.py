"""Loaders: a training stream whose batch i depends on (seed, i) only, and plain loaders for evaluation.

Batches are slices of a memory map, so there are no worker processes. Lightning sees sized, stateful objects: it fetches
no batch ahead, and a checkpoint saved after any batch continues with exactly the next one.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_lightning.data.packing import NOT_IN_LOSS, Batch, Blocks


class TrainStream:
    """The training batches as one long stream.

    One pass over the blocks gives `blocks // (batch_size * world_size)` batches; each pass is a new permutation (of its
    own generator, which nothing else touches). Batch i is slice `i % batches_per_pass` of permutation
    `i // batches_per_pass`, and rank r takes the r-th `batch_size` blocks of it. The stream never runs dry.

    Args:
        blocks: The blocks of the training split.
        batch_size: Blocks per batch and rank.
        seed: Seed of the permutations.
        length: Batches that Lightning is told of, an "epoch" for it; `None` = one pass over the blocks. A trainer with
            `max_steps` gets the whole run as one epoch.
        rank: Number of this process.
        world_size: Number of processes.
        fingerprint: Hash of the data, kept in the state to notice that it changed.

    Raises:
        ValueError: When the blocks do not fill one batch of all ranks.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        seed: int,
        length: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        fingerprint: str = "",
    ):
        self.batches_per_pass = len(blocks) // (batch_size * world_size)
        if not self.batches_per_pass:
            raise ValueError(
                f"the train split has {len(blocks)} blocks, but one step takes {batch_size} on each of {world_size} "
                "devices: lower --data.batch_size or --data.block_size, or give more text"
            )
        self.blocks = blocks
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self._seed = seed
        self._fingerprint = fingerprint
        self._is_whole_run = length is not None
        self._length = self.batches_per_pass if length is None else length
        self._next = 0
        self._permutation: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def sampler(self) -> "TrainStream":
        """This object: Lightning calls `sampler.set_epoch` at the start of every epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch, unless that is behind.

        Args:
            epoch: Number of the epoch. Nothing happens when the whole run is one epoch.
        """
        # After `limit_train_batches` the rest of the epoch is skipped. After a resume in mid-epoch the position stays.
        if not self._is_whole_run:
            self._next = max(self._next, epoch * self._length)

    def block_numbers(self, index: int) -> np.ndarray:
        """Return the block numbers [B] of batch `index` on this rank."""
        number, position = divmod(index, self.batches_per_pass)
        if self._permutation is None or self._permutation[0] != number:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, number])))
            self._permutation = (number, generator.permutation(len(self.blocks)))
        start = (position * self.world_size + self.rank) * self.batch_size
        return self._permutation[1][start : start + self.batch_size]

    def batch(self, index: int) -> Batch:
        """Return batch `index` of the stream."""
        return self.blocks.batch(self.block_numbers(index))

    def __iter__(self) -> Iterator[Batch]:
        """Go on where the stream stands, to the end of the epoch."""
        stop = (self._next // self._length + 1) * self._length
        while self._next < stop:
            batch = self.batch(self._next)
            self._next += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next batch and what decides its content."""
        return {
            "next_batch": self._next,
            "seed": self._seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to where a state was taken.

        Args:
            state_dict: What `state_dict` returned. A change of data, seed, batch size or number of devices gives a
                warning: the stream then goes on at the same batch number of another sequence.
        """
        now = self.state_dict()
        options = {
            "seed": "--data.seed",
            "batch_size": "--data.batch_size",
            "world_size": "the number of devices",
            "fingerprint": "the training data",
        }
        changed = [text for name, text in options.items() if state_dict.get(name) != now[name]]
        if changed:
            warnings.warn(
                f"{' and '.join(changed)} changed since the checkpoint was saved: training goes on at batch "
                f"{state_dict['next_batch']}, but its batches are not those of an uninterrupted run",
                stacklevel=2,
            )
        self._next = int(state_dict["next_batch"])


class BlockLoader:
    """The blocks of a split in order, `batch_size` at a time.

    Rank r takes blocks r, r + world_size, ...

    Args:
        blocks: The blocks.
        batch_size: Blocks per batch and rank.
        num_blocks: Use only the first blocks; `None` = all.
        rank: Number of this process.
        world_size: Number of processes.
        equal_ranks: Give every rank the same number of blocks: short ranks repeat a block whose labels are all -100
            and whose bytes are 0, which adds nothing to any sum. (A model wrapped for data parallel training must be
            called equally often everywhere.)
        first_block: Leave out the blocks before this one.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        num_blocks: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        equal_ranks: bool = False,
        first_block: int = 0,
    ):
        self.blocks = blocks
        self.batch_size = batch_size
        left = max(len(blocks) - first_block, 0)
        total = left if num_blocks is None else min(num_blocks, left)
        self._numbers = np.arange(first_block + rank, first_block + total, world_size)
        share = -(-total // world_size)
        self._num_fillers = share - len(self._numbers) if equal_ranks else 0
        self._numbers = np.pad(self._numbers, (0, self._num_fillers))

    def __len__(self) -> int:
        return -(-len(self._numbers) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        num_real = len(self._numbers) - self._num_fillers
        for start in range(0, len(self._numbers), self.batch_size):
            batch = self.blocks.batch(self._numbers[start : start + self.batch_size])
            first_filler = max(num_real - start, 0)
            batch["labels"][first_filler:] = NOT_IN_LOSS
            batch["token_bytes"][first_filler:] = 0
            yield batch
