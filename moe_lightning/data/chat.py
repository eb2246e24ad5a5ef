"""Conversations: rendered by the tokenizer's chat template, with only the assistant's turns in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lightning.data.tokenizers import CHATML_TEMPLATE, byte_table, bytes_of_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens.

    Args:
        ids: Token ids [tokens], int64.
        loss: Whether each token belongs to an assistant's turn [tokens], bool.
        token_bytes: UTF-8 bytes of each token [tokens], int64; 0 for special tokens.
    """

    ids: np.ndarray
    loss: np.ndarray
    token_bytes: np.ndarray


def resolve_chat_template(tokenizer: "PreTrainedTokenizerFast", option: str | None) -> str:
    """Return the chat template to use.

    Args:
        tokenizer: The tokenizer, whose own template is the default.
        option: `chatml`, a file with a Jinja template, or `None`.

    Returns:
        The template.

    Raises:
        ValueError: When the tokenizer has none and none is given.
        FileNotFoundError: When the file does not exist.
    """
    if option == "chatml":
        return CHATML_TEMPLATE
    if option is not None:
        file = Path(option).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"--data.chat_template: {option} is neither a file nor the word chatml")
        return file.read_text(encoding="utf-8")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ValueError(
            "the tokenizer has no chat template: give one by --data.chat_template (a Jinja file, or the word chatml)"
        )
    return template


class ChatEncoder:
    """Encodes conversations.

    The loss of an assistant's message covers what the template writes between the generation prompt and the end of
    that message, its end token included (that is what the model must learn to produce).

    Args:
        tokenizer: A fast tokenizer.
        template: The Jinja chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: str):
        self._tokenizer = tokenizer
        self._template = template
        self._table = byte_table(tokenizer)
        self._special_ids = np.asarray(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._special_tokens = tuple(tokenizer.all_special_tokens)

    def has_special_token(self, messages: Sequence[dict[str, Any]]) -> bool:
        """Tell whether a message spells out a special token, which would be taken for the real one."""
        return any(token in message["content"] for message in messages for token in self._special_tokens)

    def _render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool = False) -> str:
        if not messages:
            return ""
        rendered = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        assert isinstance(rendered, str)
        return rendered

    def _assistant_spans(self, name: str, messages: Sequence[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._render(messages[:number], generation_prompt=True) if number else ""
            stop = self._render(messages[: number + 1])
            if not (stop.startswith(start) and text.startswith(stop)):
                raise ValueError(
                    f"{name}: the chat template rewrites earlier turns (message {number}), so the assistant's tokens "
                    "cannot be told apart; give another one by --data.chat_template"
                )
            # the line break that a template writes after the end token is nothing to learn
            end = len(stop.rstrip()) if stop.rstrip().endswith(self._special_tokens) else len(stop)
            spans.append((len(start), end))
        return spans

    def encode(self, name: str, messages: Sequence[dict[str, Any]]) -> EncodedChat:
        """Encode one conversation.

        Args:
            name: Name of the conversation for errors.
            messages: The messages (`role`, `content`).

        Returns:
            The tokens.

        Raises:
            ValueError: When the template renders a conversation differently once another turn follows.
        """
        text = self._render(messages)
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoding["input_ids"], dtype=np.int64)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        loss = np.zeros(len(ids), dtype=bool)
        for start, stop in self._assistant_spans(name, messages, text):
            loss |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > start)
        if self._table is not None:
            token_bytes = self._table[ids]
        else:
            token_bytes = bytes_of_offsets(text, [(int(first), int(last)) for first, last in offsets])
            token_bytes[np.isin(ids, self._special_ids)] = 0
        return EncodedChat(ids, loss, token_bytes)
