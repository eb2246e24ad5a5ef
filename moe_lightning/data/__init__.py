"""Text data: sources, tokenizer training, splits, packing, and the resumable training stream."""

from moe_lightning.data.module import TextDataModule
from moe_lightning.data.packing import Blocks
from moe_lightning.data.stream import BlockLoader, TrainStream
from moe_lightning.data.tokenizers import holds_tokenizer, load_tokenizer, tokenizer_fingerprint, train_tokenizer

__all__ = [
    "BlockLoader",
    "Blocks",
    "TextDataModule",
    "TrainStream",
    "holds_tokenizer",
    "load_tokenizer",
    "tokenizer_fingerprint",
    "train_tokenizer",
]
