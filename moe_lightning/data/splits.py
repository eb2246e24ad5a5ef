"""Which document belongs to train, validation, test and calibration.

No document, and no duplicate of one, is ever in two splits. The order of documents is that of a hash of seed and
content: a shuffle that depends neither on the order of files nor on other documents, so adding a file moves few others.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_lightning.data.sources import Corpus, Document

SPLITS = ("train", "validation", "test", "calibration")
HELD_OUT = SPLITS[1:]

# With fewer documents per split than this, splits are contiguous spans of the text.
DOCUMENTS_PER_SPLIT = 4


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus found, in the seeded order.

    Args:
        indices: Positions in the corpus of the documents that are used (no duplicate, not empty).
        hashes: Hash of the content of each of them.
        sizes_bytes: UTF-8 bytes of each of them.
        num_duplicates: Documents left out because another one has the same content.
        num_empty: Documents left out because they hold nothing but white space.
    """

    indices: tuple[int, ...]
    hashes: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    num_duplicates: int
    num_empty: int


@dataclass(frozen=True)
class Piece:
    """A document, or the part of it between two byte offsets, in one split.

    Args:
        index: Position in the corpus.
        content: Hash of the whole document's content.
        start: First byte.
        stop: Byte after the last one; `None` = to the end.
    """

    index: int
    content: str
    start: int = 0
    stop: int | None = None

    def text_of(self, document: Document) -> str:
        """Cut this piece out of its document; a character cut in two is left out."""
        if self.start == 0 and self.stop is None:
            return document.text
        return document.text.encode()[self.start : self.stop].decode("utf-8", "ignore")


@dataclass(frozen=True)
class Splits:
    """Pieces per split, and how they were made.

    Args:
        pieces: For each split in use its pieces, in the order of packing.
        by: `documents`, or `spans` when there were too few documents.
    """

    pieces: dict[str, tuple[Piece, ...]]
    by: str


def survey(
    corpus: Corpus, documents: Iterable[Document], seed: int, max_documents: int | None, max_bytes: int | None
) -> Survey:
    """Read every document once: hash, size, duplicates; and bring them into the seeded order.

    Args:
        corpus: The corpus, for the names in errors.
        documents: The corpus again, or an iterator over it that shows progress.
        seed: Seed of the order.
        max_documents: Keep only this many documents, the first ones of the seeded order.
        max_bytes: Keep only as many documents as fit into this many bytes of text (at least one).

    Returns:
        The survey.

    Raises:
        ValueError: When no document holds text.
    """
    seen: dict[str, tuple[bytes, int, int]] = {}
    num_duplicates = num_empty = 0
    for index, document in enumerate(documents):
        if not document.text.strip():
            num_empty += 1
            continue
        content = hashlib.blake2b(document.identity, digest_size=16).digest()
        if content.hex() in seen:
            num_duplicates += 1
            continue
        order = hashlib.blake2b(str(seed).encode() + content, digest_size=16).digest()
        seen[content.hex()] = (order, index, len(document.text.encode()))
    if not seen:
        names = ", ".join(source.name for source in corpus.sources)
        raise ValueError(f"--data.sources: {names} holds no text ({num_empty} empty documents)")
    ordered = sorted(seen, key=lambda content: seen[content][0])
    if max_documents is not None:
        ordered = ordered[:max_documents]
    if max_bytes is not None:
        ordered = _within(ordered, [seen[content][2] for content in ordered], max_bytes)
    return Survey(
        indices=tuple(seen[content][1] for content in ordered),
        hashes=tuple(ordered),
        sizes_bytes=tuple(seen[content][2] for content in ordered),
        num_duplicates=num_duplicates,
        num_empty=num_empty,
    )


def _within(items: Sequence[str], sizes: Sequence[int], limit: int) -> list[str]:
    total = 0
    kept = []
    for item, size in zip(items, sizes, strict=True):
        # a document that does not fit is passed over: one long document must not end the selection
        if total + size <= limit:
            total += size
            kept.append(item)
    return kept or [min(zip(sizes, items, strict=True))[1]]


def split_documents(survey: Survey, targets_bytes: dict[str, float], gap_bytes: int, can_cut: bool) -> Splits:
    """Give every document to one split.

    Held-out splits take documents in the seeded order until they have their size, passing over documents that would
    make them more than twice as large; train gets the rest. Where there are too few documents for that (fewer than
    four per split, or sizes too uneven), all documents are laid end to end and the splits are contiguous spans of that
    text: train, gap, validation, gap, test, gap, calibration.

    Args:
        survey: The documents.
        targets_bytes: Wanted bytes of each held-out split in use.
        gap_bytes: Bytes left out between two spans.
        can_cut: Whether documents may be cut (conversations may not).

    Returns:
        The splits.

    Raises:
        ValueError: When the text is too small for the splits.
    """
    by_document = _by_documents(survey, targets_bytes)
    if by_document is not None:
        return Splits(by_document, by="documents")
    if not can_cut:
        raise ValueError(
            f"--data.sources: {len(survey.indices)} conversations are too few for train and {len(targets_bytes)} "
            f"held-out splits; give at least {DOCUMENTS_PER_SPLIT * (1 + len(targets_bytes))}, or set one of "
            f"{', '.join('--data.' + name for name in targets_bytes)} to 0"
        )
    return Splits(_by_spans(survey, targets_bytes, gap_bytes), by="spans")


def _by_documents(survey: Survey, targets_bytes: dict[str, float]) -> dict[str, tuple[Piece, ...]] | None:
    pieces = [Piece(index, content) for index, content in zip(survey.indices, survey.hashes, strict=True)]
    if not targets_bytes:
        return {"train": tuple(pieces)}
    if len(pieces) < DOCUMENTS_PER_SPLIT * (1 + len(targets_bytes)):
        return None
    rest = list(range(len(pieces)))
    found: dict[str, tuple[Piece, ...]] = {}
    for name, target in targets_bytes.items():
        taken: list[int] = []
        total = 0
        for number in rest:
            if total >= target:
                break
            if total + survey.sizes_bytes[number] <= 2 * target:
                taken.append(number)
                total += survey.sizes_bytes[number]
        if not taken:
            # documents are all larger than the split: the smallest one, if it is not out of all proportion
            smallest = min(rest, key=lambda number: survey.sizes_bytes[number])
            if survey.sizes_bytes[smallest] > 4 * target:
                return None
            taken = [smallest]
        elif total < target / 2:
            return None
        found[name] = tuple(pieces[number] for number in taken)
        rest = [number for number in rest if number not in set(taken)]
    if not rest:
        return None
    return {"train": tuple(pieces[number] for number in rest), **found}


def _by_spans(survey: Survey, targets_bytes: dict[str, float], gap_bytes: int) -> dict[str, tuple[Piece, ...]]:
    total = sum(survey.sizes_bytes)
    train = total - sum(int(target) + gap_bytes for target in targets_bytes.values())
    if train <= 0:
        options = ", ".join("--data." + name for name in targets_bytes)
        raise ValueError(
            f"--data.sources: {total} bytes of text are too little for held-out splits of "
            f"{', '.join(str(int(target)) for target in targets_bytes.values())} bytes and gaps of {gap_bytes}: "
            f"give more text, lower {options}, or set one of them to 0, or lower --data.block_size"
        )
    found = {"train": _span(survey, 0, train)}
    position = train
    for name, target in targets_bytes.items():
        position += gap_bytes
        found[name] = _span(survey, position, position + int(target))
        position += int(target)
    return found


def _span(survey: Survey, start: int, stop: int) -> tuple[Piece, ...]:
    pieces = []
    position = 0
    for index, content, size in zip(survey.indices, survey.hashes, survey.sizes_bytes, strict=True):
        first, last = max(start - position, 0), min(stop - position, size)
        if first < last:
            pieces.append(Piece(index, content, first, None if last == size else last))
        position += size
    return tuple(pieces)
