"""Prompts for `predict`: read from options or a file, in batches padded on the left."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_lightning.data.tokenizers import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_prompts(prompts: Sequence[str] | None, prompts_file: str | None) -> list[str]:
    """Collect the prompts.

    Args:
        prompts: The prompts themselves.
        prompts_file: A text file with one prompt per line (blank lines are skipped), or .jsonl with a field `prompt`.

    Returns:
        The prompts.

    Raises:
        ValueError: When there is none, one is empty, or the file is not what it should be.
        FileNotFoundError: When the file does not exist.
    """
    if prompts_file is not None:
        file = Path(prompts_file).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"--data.prompts_file: there is no file {prompts_file}")
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [line for line in lines if line.strip()]
        if file.suffix == ".jsonl":
            found = [
                _prompt_of(line, f"{prompts_file} line {number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
        if not found:
            raise ValueError(f"--data.prompts_file: {prompts_file} holds no prompt")
    else:
        found = list(prompts or [])
    if not found:
        raise ValueError("predict has nothing to continue: give --data.prompts '[\"...\"]' or --data.prompts_file FILE")
    if not all(prompt.strip() for prompt in found):
        raise ValueError("--data.prompts: a prompt is empty")
    return found


def _prompt_of(line: str, name: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"--data.prompts_file: {name} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'--data.prompts_file: {name} has no field "prompt" with a text')
    return row["prompt"]


class PromptLoader:
    """Batches of prompts, padded on the left so that every row ends with its last token.

    Args:
        prompts: The prompts.
        tokenizer: The tokenizer; what it adds at the start of a text (`<s>`) is added, at the end nothing.
        batch_size: Prompts per batch.
        rank: Number of this process, which takes prompts rank, rank + world_size, ...
        world_size: Number of processes.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: "PreTrainedTokenizerFast",
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.prompts = list(prompts)[rank::world_size]
        self.batch_size = batch_size
        self._padding_id = padding_id(tokenizer)
        first = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
        self._ids = [first + list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, self._ids, strict=True):
            if not ids:
                raise ValueError(f"--data.prompts: the prompt {prompt!r} has no token")

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.prompts), self.batch_size):
            rows = self._ids[start : start + self.batch_size]
            width = max(map(len, rows))
            yield {
                "input_ids": torch.tensor([[self._padding_id] * (width - len(row)) + row for row in rows]),
                "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
                "prompt": self.prompts[start : start + self.batch_size],
            }
