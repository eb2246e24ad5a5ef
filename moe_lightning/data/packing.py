"""Blocks of tokens: packed on disk once, then read by memory map.

Plain text: the tokens of all documents of a split, each followed by the end-of-text token, are laid end to end and cut
into blocks; what is left over at the end is dropped. Attention crosses document borders within a block.
Chat: one conversation per block, padded on the right.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_lightning.data.cache import atomic_folder
from moe_lightning.data.chat import ChatEncoder
from moe_lightning.data.sources import Document
from moe_lightning.data.tokenizers import TextEncoder, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Batch = dict[str, torch.Tensor]

NOT_IN_LOSS = -100

# Longer texts are encoded in parts (memory): cut where a line ends and the next one begins with no white space around,
# which the usual pre-tokenizers split anyway.
_PART_CHARACTERS = 1 << 20
_CLEAN_CUT = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Blocks:
    """The blocks of one split. N blocks of S tokens.

    Args:
        tokens: Token ids [N, S].
        token_bytes: UTF-8 bytes per token [N, S]; `None` = look them up in `byte_table`.
        byte_table: UTF-8 bytes per token id [V]; needed where `token_bytes` is `None`.
        loss: Whether a token is in the loss [N, S]; `None` = all.
        lengths: Tokens before padding [N]; `None` = no padding.
        info: Plain counts: `documents`, `blocks`, `tokens`, `bytes`, ...
    """

    tokens: np.ndarray
    token_bytes: np.ndarray | None
    byte_table: np.ndarray | None
    loss: np.ndarray | None
    lengths: np.ndarray | None
    info: dict[str, Any]

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.tokens.shape[1])

    def batch(self, indices: np.ndarray) -> Batch:
        """Read blocks.

        Args:
            indices: Block numbers [B].

        Returns:
            `input_ids`, `labels` (-100 = not in the loss; not shifted) and `token_bytes`, each int64 [B, S], and
            `attention_mask` (int64 [B, S]) when there is padding.
        """
        tokens = np.asarray(self.tokens[indices], dtype=np.int64)
        labels = tokens.copy()
        if self.loss is not None:
            labels[~np.asarray(self.loss[indices], dtype=bool)] = NOT_IN_LOSS
        if self.token_bytes is not None:
            token_bytes = np.asarray(self.token_bytes[indices], dtype=np.int64)
        else:
            assert self.byte_table is not None
            token_bytes = self.byte_table[tokens]
        batch = {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "token_bytes": torch.from_numpy(token_bytes),
        }
        if self.lengths is not None:
            lengths = np.asarray(self.lengths[indices], dtype=np.int64)
            if (lengths < self.block_size).any():
                mask = np.arange(self.block_size)[None, :] < lengths[:, None]
                batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        cut = _CLEAN_CUT.search(text, start + _PART_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _groups(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    # groups of (part, is the last part of its document), large enough to keep the encoder's threads busy
    group: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        parts = list(_parts(text))
        for number, part in enumerate(parts):
            group.append((part, number == len(parts) - 1))
            size += len(part)
            if size >= _PART_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def pack_texts(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerFast",
    block_size: int,
    folder: Path,
    max_blocks: int | None = None,
) -> None:
    """Encode texts and write their blocks into a folder, all or nothing.

    Args:
        texts: The documents, in order.
        tokenizer: The tokenizer.
        block_size: Tokens per block.
        folder: The folder to make.
        max_blocks: Stop after this many blocks.
    """
    encoder = TextEncoder(tokenizer)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    wanted = None if max_blocks is None else max_blocks * block_size
    num_tokens = num_documents = num_bytes = 0
    with atomic_folder(folder) as new:
        with (new / "tokens.bin").open("wb") as ids_file, (new / "token_bytes.bin").open("wb") as bytes_file:
            at_start = True
            for group in _groups(texts):
                encoded = encoder.encode([part for part, _ in group])
                for (_, is_last), (ids, token_bytes) in zip(group, encoded, strict=True):
                    before = encoder.prefix if at_start else []
                    after = [encoder.eos_id] if is_last else []
                    ids = np.concatenate([np.asarray(before, np.int64), ids, np.asarray(after, np.int64)])
                    ids_file.write(ids.astype(dtype).tobytes())
                    if token_bytes is not None:
                        token_bytes = np.pad(token_bytes, (len(before), len(after)))
                        bytes_file.write(token_bytes.astype(np.uint32).tobytes())
                    num_tokens += len(ids)
                    num_documents += at_start
                    at_start = is_last
                if wanted is not None and num_tokens >= wanted:
                    break
            num_blocks = num_tokens // block_size
            if max_blocks is not None:
                num_blocks = min(num_blocks, max_blocks)
            ids_file.truncate(num_blocks * block_size * dtype.itemsize)
            if encoder.byte_table is None:
                bytes_file.truncate(num_blocks * block_size * 4)
        if encoder.byte_table is not None:
            (new / "token_bytes.bin").unlink()
            np.save(new / "byte_table.npy", encoder.byte_table)
        if num_blocks:
            num_bytes = _sum_bytes(new, dtype, encoder.byte_table)
        _write_info(
            new,
            {
                "kind": "text",
                "documents": num_documents,
                "blocks": num_blocks,
                "block_size": block_size,
                "tokens": num_blocks * block_size,
                "bytes": num_bytes,
                "tokens_found": num_tokens,
                "dtype": dtype.name,
            },
        )


def _sum_bytes(folder: Path, dtype: np.dtype, byte_table: np.ndarray | None) -> int:
    if byte_table is None:
        return int(np.memmap(folder / "token_bytes.bin", np.uint32, mode="r").sum(dtype=np.int64))
    tokens = np.memmap(folder / "tokens.bin", dtype, mode="r")
    counts = np.zeros(len(byte_table), np.int64)
    for start in range(0, len(tokens), _PART_CHARACTERS):
        counts += np.bincount(tokens[start : start + _PART_CHARACTERS], minlength=len(byte_table))
    return int(counts @ byte_table)


def pack_chats(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerFast",
    template: str,
    block_size: int,
    folder: Path,
    max_blocks: int | None = None,
) -> None:
    """Encode conversations, one per block, and write the blocks into a folder, all or nothing.

    A conversation longer than a block is cut at its end; one without a token in the loss (no assistant's turn, or all
    of it cut off) or with a special token spelled out in a message is dropped. `info` counts each.

    Args:
        documents: The conversations.
        tokenizer: The tokenizer.
        template: The chat template.
        block_size: Tokens per block.
        folder: The folder to make.
        max_blocks: Stop after this many blocks.
    """
    encoder = ChatEncoder(tokenizer, template)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    pad = padding_id(tokenizer)
    counts = {"documents": 0, "truncated": 0, "without_loss": 0, "with_special_tokens": 0}
    lengths: list[int] = []
    num_bytes = num_loss_tokens = 0
    with atomic_folder(folder) as new:
        with (
            (new / "tokens.bin").open("wb") as ids_file,
            (new / "token_bytes.bin").open("wb") as bytes_file,
            (new / "loss.bin").open("wb") as loss_file,
        ):
            for document in documents:
                if max_blocks is not None and len(lengths) == max_blocks:
                    break
                assert document.messages is not None
                counts["documents"] += 1
                if encoder.has_special_token(document.messages):
                    counts["with_special_tokens"] += 1
                    continue
                chat = encoder.encode(document.name, document.messages)
                # the first token is never predicted, so a loss on it alone is none
                if not chat.loss[1:block_size].any():
                    counts["without_loss"] += 1
                    continue
                length = min(len(chat.ids), block_size)
                counts["truncated"] += len(chat.ids) > block_size
                tail = (0, block_size - length)
                ids_file.write(np.pad(chat.ids[:length], tail, constant_values=pad).astype(dtype).tobytes())
                bytes_file.write(np.pad(chat.token_bytes[:length], tail).astype(np.uint32).tobytes())
                loss_file.write(np.pad(chat.loss[:length], tail).astype(np.uint8).tobytes())
                lengths.append(length)
                num_bytes += int(chat.token_bytes[:length].sum())
                num_loss_tokens += int(chat.loss[:length].sum())
        np.save(new / "lengths.npy", np.asarray(lengths, dtype=np.int64))
        _write_info(
            new,
            {
                "kind": "chat",
                **counts,
                "blocks": len(lengths),
                "block_size": block_size,
                "tokens": sum(lengths),
                "loss_tokens": num_loss_tokens,
                "bytes": num_bytes,
                "dtype": dtype.name,
            },
        )


def _write_info(folder: Path, info: dict[str, Any]) -> None:
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def open_blocks(folder: Path) -> Blocks:
    """Open the blocks of a folder by memory map.

    Args:
        folder: A folder that `pack_texts` or `pack_chats` wrote.

    Returns:
        The blocks.

    Raises:
        ValueError: When a file is missing or cut off.
    """
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    shape = (info["blocks"], info["block_size"])

    def read(name: str, dtype: Any) -> np.ndarray:
        if not info["blocks"]:
            return np.zeros(shape, dtype)  # an empty file cannot be mapped
        try:
            return np.memmap(folder / name, dtype=dtype, mode="r", shape=shape)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the cached file {folder / name} is damaged ({error}): delete the folder {folder}"
            ) from error

    table = folder / "byte_table.npy"
    is_chat = info["kind"] == "chat"
    return Blocks(
        tokens=read("tokens.bin", np.dtype(info["dtype"])),
        token_bytes=None if table.is_file() else read("token_bytes.bin", np.uint32),
        byte_table=np.load(table) if table.is_file() else None,
        loss=read("loss.bin", np.uint8) if is_chat else None,
        lengths=np.load(folder / "lengths.npy") if is_chat else None,
        info=info,
    )
