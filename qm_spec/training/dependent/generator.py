"""Dependent documents of a wanted length and density."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from qm_spec.training.dependent.document import Document
from qm_spec.training.dependent.kinds import KINDS, kind_class
from qm_spec.training.dependent.manuscript import Manuscript
from qm_spec.training.dependent.prose import Prose, check_prose
from qm_spec.training.dependent.vocabulary import Vocabulary

MIN_LENGTH = 1000


def generate(kind: str, length: int, seed: int, filler: Sequence[str], density: float = 0.2) -> Document:
    """Write a document, the same one for the same arguments.

    Args:
        kind: one of `KINDS`.
        length: characters, at least `MIN_LENGTH`; the text ends with the last whole word before.
        seed: any integer.
        filler: real prose, for passages between and for quotations.
        density: wanted share of dependent characters, 0..1; no kind goes beyond its `most`, from 0.02 (needle) to
            0.5 (words).

    Raises:
        ValueError: the kind is unknown, the filler too little, or the length or density out of range.
    """
    writer = kind_class(kind)
    _check_numbers(length, density)
    check_prose(filler)
    rng = Random(f"{kind} {length} {seed}")
    out = Manuscript(rng)
    text = writer(out, Prose(filler, rng), Vocabulary(rng), length)
    density = min(density, writer.most)
    # Where little is asked for, little is stated.
    share = writer.share * min(1.0, 2 * density / writer.most)
    stated = 0
    while out.length < length:
        before = out.length
        if stated < share * (writer.early * length + (1 - writer.early) * before) or not out.num_facts:
            text.state()
            stated += out.length - before
        elif out.num_dependent < density * before:
            text.recall()
        else:
            text.fill()
    return out.finish(kind, length)


def generate_many(
    num_documents: int,
    length: int | tuple[int, int],
    seed: int,
    filler: Sequence[str],
    kinds: Sequence[str] = KINDS,
    density: float = 0.2,
) -> Iterator[Document]:
    """Yield documents of mixed kinds whose dependent characters together have the wanted share.

    What a kind of few dependent characters lacks, the documents after it make up for as far as they can.

    Args:
        num_documents: how many.
        length: characters of each, or the least and the greatest, from which each is drawn uniformly.
        seed: any integer.
        filler: see `generate`.
        kinds: drawn from uniformly.
        density: wanted share of dependent characters, 0..1; all kinds together reach 0.24.

    Raises:
        ValueError: see `generate`.
    """
    least, greatest = (length, length) if isinstance(length, int) else length
    if not kinds:
        raise ValueError(f"generate: kinds must name at least one of {', '.join(sorted(KINDS))}, got none")
    for kind in kinds:
        kind_class(kind)
    if least > greatest:
        raise ValueError(f"generate: length must be (least, greatest), got ({least}, {greatest})")
    _check_numbers(least, density)
    check_prose(filler)
    return _documents(num_documents, least, greatest, seed, filler, kinds, density)


def _documents(
    num_documents: int,
    least: int,
    greatest: int,
    seed: int,
    filler: Sequence[str],
    kinds: Sequence[str],
    density: float,
) -> Iterator[Document]:
    rng = Random(seed)
    # Dependent characters that are missing so far.
    missing = 0.0
    for _ in range(num_documents):
        length = rng.randint(least, greatest)
        wanted = min(1.0, max(0.0, density + missing / length))
        document = generate(rng.choice(kinds), length, rng.getrandbits(63), filler, wanted)
        missing += (density - document.density) * len(document.text)
        yield document


def _check_numbers(length: int, density: float) -> None:
    if length < MIN_LENGTH:
        raise ValueError(f"generate: length must be at least {MIN_LENGTH} characters, got {length}")
    if not 0 <= density <= 1:
        raise ValueError(f"generate: density must be a share in 0..1, got {density:g}")
