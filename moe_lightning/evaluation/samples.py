"""What a model writes: greedy continuations of prompts, to be laid side by side with those of another model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation.likelihood import NOT_IN_LOSS
from moe_lightning.evaluation.records import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Mapping[str, Tensor]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts: what the tokenizer begins a text with, then the text, and no end.

    Args:
        tokenizer: The tokenizer.
        prompts: The prompts.

    Raises:
        ValueError: A prompt has no token.
    """
    start = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    found = []
    for prompt in prompts:
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"prompts: the prompt {prompt!r} has no token; write something to continue")
        # A conversation that the tokenizer's template rendered begins with it already.
        found.append(ids if ids[: len(start)] == start else start + ids)
    return found


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    batch_size: int = 8,
) -> list[Sample]:
    """Continue prompts greedily: at every step the likeliest token, up to the end-of-text token.

    Prompts of a batch are padded on the left. What is written does not depend on the batch, but for the rounding of
    narrow types where two tokens are about equally likely. No random number is drawn.

    Args:
        model: A causal language model, compressed or not; every module is left in the mode that it was in. What its
            own generation config asks for (sampling, penalties, stop strings) is not used.
        tokenizer: Its tokenizer.
        prompts: The texts to continue.
        new_tokens: Tokens to add at most.
        batch_size: Prompts at a time. A tokenizer that has neither a padding nor an end-of-text token takes one.

    Returns:
        One sample for each prompt, in their order, without special tokens in the continuations.

    Raises:
        ValueError: A prompt has no token, or a number is below 1.

    Cost:
        One pass over the prompts, and one decoding step for each new token, of each batch.
    """
    if new_tokens < 1 or batch_size < 1:
        raise ValueError(f"new_tokens {new_tokens} and batch_size {batch_size} must be at least 1")
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if padding is None:
        batch_size = 1
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=padding,
        bos_token_id=tokenizer.bos_token_id,
    )
    rows = prompt_ids(tokenizer, prompts)
    found: list[Sample] = []
    with evaluation_mode(model):
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            for prompt, ids in zip(prompts[first:], _continue(model, part, settings), strict=False):
                found.append(Sample(prompt, tokenizer.decode(ids, skip_special_tokens=True)))
    return found


def _continue(model: PreTrainedModel, rows: Sequence[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """Return the new ids of each row, without what stands behind its end-of-text token."""
    device = next(model.parameters()).device
    width = max(map(len, rows))
    padding = 0 if settings.pad_token_id is None else settings.pad_token_id
    input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    # generate() fills what a config leaves open from the model's own one; for this call the model has none.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        produced = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    finally:
        model.generation_config = own
    found = produced[:, width:].tolist()
    return [row[: row.index(settings.eos_token_id)] if settings.eos_token_id in row else row for row in found]


def default_prompts(
    batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase, count: int = 4, tokens: int = 32
) -> list[str]:
    """Take prompts from the first blocks of a text, not more than one of each.

    Of packed text a prompt is the beginning of a document where a block holds one, else a piece from the middle of one
    without the broken words at its ends. Blocks in which a document begins are taken first: prompts are then of
    different documents. Of conversations a prompt is all up to the first answer.

    Args:
        batches: Batches of the text, with `input_ids` [B, S] and, where there are any, `labels` and `attention_mask`.
            The first `16 * count` blocks are looked at, or what there is.
        tokenizer: The tokenizer that made them.
        count: Prompts wanted. There are fewer where the text is short.
        tokens: Tokens of a prompt, at most; a conversation is not cut.

    Returns:
        The prompts, each another one.

    Raises:
        ValueError: No block has anything to continue.
    """
    beginnings: dict[str, None] = {}
    middles: dict[str, None] = {}
    for ids, labels_S in itertools.islice(_blocks(batches), 16 * count):
        prompt, at_start = _prompt_of(ids, labels_S, tokenizer, tokens)
        if prompt:
            (beginnings if at_start else middles)[prompt] = None
        if len(beginnings) == count:
            break
    missing = count - len(beginnings)
    # Neighbouring blocks are of one document: those that fill up are spread.
    spread = list(middles)[:: max(1, len(middles) // missing)][:missing] if missing else []
    found = list(dict.fromkeys([*beginnings, *spread]))
    if not found and count:
        raise ValueError("no block of the text has anything to continue: give prompts")
    return found


def _blocks(batches: Iterable[Batch]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield ids and labels of each block, without padding."""
    for batch in batches:
        labels = batch.get("labels", batch["input_ids"])
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for ids_S, labels_S, mask_S in zip(batch["input_ids"], labels, mask, strict=True):
            yield ids_S[mask_S].tolist(), labels_S[mask_S]


def _prompt_of(ids: list[int], labels_S: Tensor, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[str, bool]:
    """Return a prompt from a block, empty where there is none, and whether something begins with it."""
    counted = (labels_S != NOT_IN_LOSS).nonzero().flatten().tolist()
    if not counted:
        return "", False  # a block that only fills up a batch
    if counted[0] > 0:
        # A conversation: the turns before the first answer, with the template's marks.
        return tokenizer.decode(ids[: counted[0]], skip_special_tokens=False), True
    special = set(tokenizer.all_special_ids)
    borders = [-1, *(place for place, token in enumerate(ids) if token in special), len(ids)]
    pieces = [(ids[first + 1 : stop], first >= 0) for first, stop in itertools.pairwise(borders)]
    # The first document that begins here and is long enough, else the longest piece.
    long = [piece for piece in pieces if piece[1] and len(piece[0]) > tokens]
    piece, at_start = long[0] if long else max(pieces, key=lambda piece: len(piece[0]))
    text = tokenizer.decode(piece[:tokens])
    if not at_start:
        text = text.lstrip()
        text = text[len(text.split(maxsplit=1)[0]) :] if len(text.split()) > 1 else text
    if len(piece) > tokens:
        text = text[: -len(text.split()[-1])] if text[-1:].strip() and len(text.split()) > 1 else text
    # Half a character may be left where words have no blanks between them.
    return text.strip().strip("\ufffd"), at_start
