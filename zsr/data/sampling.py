"""Batch sampling: one bounded reservoir per class, and sampling as a function of (seed, step, rank).

The papers sample same-class pairs uniformly over classes. With a reservoir that holds every row of a class this is
exact; with a bounded one the rows come from a seeded sample of those streamed so far. The content of a reservoir
depends only on the rows that were added and their order.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from zsr.batch import Batch
from zsr.data.rows import order_key_of_one
from zsr.data.shards import Block
from zsr.errors import ConfigError

logger = logging.getLogger("zsr")


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several integers, in order; (1, 2) and (2, 1) differ."""
    mixed = 0
    for part in parts:
        mixed = order_key_of_one(mixed ^ (part % 2**62), seed=7)
    return mixed % 2**63


class Reservoir:
    """At most `capacity` rows of each class of one modality (Vitter's algorithm R, randomized by a hash).

    Args:
        classes: number of classes.
        capacity: max rows per class.
        seed: seed of the hash.
    """

    def __init__(self, classes: int, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.seed = seed
        self.seen = np.zeros(classes, dtype=np.int64)
        self.slots: list[list[int]] = [[] for _ in range(classes)]
        self.used = 0
        self.features = torch.empty(0, 0)
        self.ids = np.empty(0, dtype=np.int64)
        self.pairs = np.empty(0, dtype=np.int64)

    def add(self, block: Block) -> None:
        """Add rows; a full class replaces a held row with probability capacity / rows seen."""
        places = [self._place(int(label)) for label in block.labels]
        kept = {place: row for row, place in enumerate(places) if place >= 0}  # a later row replaces an earlier one
        if not kept:
            return
        self._grow(max(kept) + 1, torch.from_numpy(block.features[:0].copy()))  # a copy: Arrow's memory is read-only
        slots, rows = np.fromiter(kept, np.int64), np.fromiter(kept.values(), np.int64)
        self.features[torch.from_numpy(slots)] = torch.from_numpy(block.features[rows])
        self.ids[slots] = block.ids[rows]
        self.pairs[slots] = block.pairs[rows]

    def _place(self, label: int) -> int:
        """The slot for the next row of this class, or -1 to skip it."""
        count = int(self.seen[label])
        self.seen[label] += 1
        held = self.slots[label]
        if len(held) < self.capacity:
            held.append(self.used)
            self.used += 1
            return held[-1]
        coin = seed_of(self.seed, label, count) % (count + 1)
        return held[coin] if coin < self.capacity else -1

    def _grow(self, rows: int, like: Tensor) -> None:
        if rows <= len(self.ids):
            return
        size = max(rows, 2 * len(self.ids))
        features = like.new_zeros(size, *like.shape[1:])
        features[: len(self.ids)] = self.features if len(self.ids) else features[:0]
        self.features = features
        self.ids = np.resize(self.ids, size)
        self.pairs = np.resize(self.pairs, size)

    def finish(self, device: str) -> "Pool":
        """The held rows on `device`, sorted by id within a class: the same rows in any order give the same pool."""
        order = [sorted(slots, key=lambda s: int(self.ids[s])) for slots in self.slots]
        flat = np.array([slot for slots in order for slot in slots], dtype=np.int64)
        sizes = np.array([len(slots) for slots in order], dtype=np.int64)
        return Pool(
            features=self.features[torch.from_numpy(flat)].to(device),
            ids=self.ids[flat],
            pairs=self.pairs[flat],
            sizes=torch.from_numpy(sizes),
        )


@dataclass(frozen=True)
class Pool:
    """Rows of one modality, grouped by class.

    Attributes:
        features: (N, D) float32, or images (N, H, W, 3) uint8, on the training device.
        ids, pairs: (N,) int64, see `shards.Block`.
        sizes: (C,) int64 rows of each class; class c starts at sizes[:c].sum().
    """

    features: Tensor
    ids: np.ndarray
    pairs: np.ndarray
    sizes: Tensor

    @property
    def has_pairs(self) -> bool:
        """Whether any row names the photo that it belongs to."""
        return bool((self.pairs != self.ids).any())

    def draw(self, labels: Tensor, generator: torch.Generator, consumed: int) -> Tensor:
        """Sample a row of each label uniformly: (B,) labels -> (B,) row numbers. `consumed` has no effect."""
        starts = torch.cumsum(self.sizes, 0) - self.sizes
        uniform = torch.rand(labels.shape[0], generator=generator, dtype=torch.float64)
        return starts[labels] + (uniform * self.sizes[labels]).long()


class Side(Protocol):
    """Rows of one modality that can be sampled by class: a `Pool`, or the rolling reservoirs of a stream.

    Attributes:
        ids, pairs: (N,) int64, see `shards.Block`.
    """

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def pairs(self) -> np.ndarray: ...
    @property
    def sizes(self) -> Tensor:
        """(C,) int64: rows of each class that can be sampled."""
        ...

    @property
    def has_pairs(self) -> bool:
        """Whether any row names the photo that it belongs to."""
        ...

    def draw(self, labels: Tensor, generator: torch.Generator, consumed: int) -> Tensor:
        """Sample a row of each label uniformly, (B,) -> (B,) row numbers, after `consumed` rows since step 0."""
        ...


@dataclass(frozen=True, slots=True)
class Draw:
    """Row numbers of a batch.

    Attributes:
        labels: (B,) class of each row.
        sketch, photo: (B,) row numbers in the two modalities.
        negative_labels, negative: (B,) class and photo row of each negative; only in triplet batches.
    """

    labels: Tensor
    sketch: Tensor
    photo: Tensor
    negative_labels: Tensor | None = None
    negative: Tensor | None = None


class Draws:
    """Sample the global batch of a step, and give each rank its rows.

    Every rank samples all rows, so (seed, step) determines the global batch: 1 rank x 2B and 2 ranks x B see the same
    rows.

    Args:
        sketch, photo: rows of the two modalities, with the same classes.
        paired: use the photo that a sketch was drawn from, if there is one, instead of any photo of its class.
        triplets: add a photo of another class.
        negatives: (C, C) sampling weights of that class, with one row per anchor class; None for uniform weights.

    Raises:
        ConfigError: fewer than two classes have both modalities, no sketch has its photo, or see `_cumulative`.
    """

    def __init__(
        self,
        sketch: Side,
        photo: Side,
        seed: int,
        *,
        paired: bool = False,
        triplets: bool = False,
        negatives: Tensor | None = None,
    ) -> None:
        self.sketch, self.photo, self.seed = sketch, photo, seed
        self.triplets = triplets
        self.classes = torch.nonzero((sketch.sizes > 0) & (photo.sizes > 0)).flatten()
        if len(self.classes) < 2:
            raise ConfigError(
                f"{len(self.classes)} training classes have both sketches and photos; at least 2 are required"
            )
        self.partner = self._partners() if paired else None
        self.cumulative = None if negatives is None else self._cumulative(negatives)

    def _partners(self) -> Tensor:
        """Photo row of each sketch row, -1 for none. Raises ConfigError if no sketch has its photo."""
        order = np.argsort(self.photo.ids, kind="stable")
        place = np.minimum(np.searchsorted(self.photo.ids, self.sketch.pairs, sorter=order), len(order) - 1)
        found = np.where(self.photo.ids[order[place]] == self.sketch.pairs, order[place], -1)
        if not (found >= 0).any():
            raise ConfigError("--paired requires sketches with a `pair`, but none has one; use --no-paired")
        return torch.from_numpy(found.astype(np.int64))

    def of(self, step: int, size: int, rank: int = 0, world: int = 1, repetition: int = 0) -> Draw:
        """The `size` rows of rank `rank` of the global batch of `step`, which differs for each repetition.

        Each step consumes as many rows of both streams as its global batch has.
        """
        generator = torch.Generator().manual_seed(seed_of(self.seed, step, repetition))
        total = size * world
        labels = self.classes[torch.randint(len(self.classes), (total,), generator=generator)]
        sketch = self.sketch.draw(labels, generator, step * total)
        photo = self.photo.draw(labels, generator, step * total)
        if self.partner is not None:
            photo = torch.where(self.partner[sketch] >= 0, self.partner[sketch], photo)
        mine = slice(rank * size, (rank + 1) * size)
        if not self.triplets:
            return Draw(labels[mine], sketch[mine], photo[mine])
        others = self._others(labels, generator)
        negative = self.photo.draw(others, generator, step * total)
        return Draw(labels[mine], sketch[mine], photo[mine], others[mine], negative[mine])

    def _cumulative(self, weights: Tensor) -> Tensor:
        """Cumulative probability of each class as the negative of each anchor, (C', C') over the classes held.

        Raises:
            ConfigError: an anchor for which no other class can be sampled.
        """
        other = weights.detach().cpu().double()[self.classes][:, self.classes].fill_diagonal_(0.0)
        total = other.sum(1)
        bad = torch.nonzero(~(torch.isfinite(total) & (total > 0) & (other >= 0).all(1))).flatten()
        if len(bad):
            first = int(bad[0])
            raise ConfigError(
                f"{len(bad)} classes have no negative class to sample: the weights of class {int(self.classes[first])} "
                f"for the others sum to {float(total[first]):g}; the class embeddings are too far apart or not finite "
                "(normalize them to unit length)"
            )
        share = other / total.unsqueeze(1)
        perplexity = torch.exp(torch.special.entr(share).sum(1)).median()
        logger.info("negatives of a class: %.1f classes (median perplexity over %d classes)", perplexity, len(share))
        cumulative = torch.cumsum(other, 1)
        return cumulative / cumulative[:, -1:]  # the last entry is exactly 1, so that every sample in [0, 1) is below

    def _others(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Sample another class for each label, by the given weights or uniformly."""
        place = torch.searchsorted(self.classes, labels)
        if self.cumulative is not None:
            height = torch.rand(labels.shape[0], 1, generator=generator, dtype=torch.float64)
            return self.classes[torch.searchsorted(self.cumulative[place], height, right=True).flatten()]
        jump = torch.randint(1, len(self.classes), labels.shape, generator=generator)
        return self.classes[(place + jump) % len(self.classes)]


class Sampler:
    """Batches of rows that are in memory.

    Args:
        sketch, photo: the pools that `draws` samples from.
        words: (C, S) class embeddings.

    Attributes:
        waited: seconds that callers of `batch` waited for data; 0, since all of it is in memory.
    """

    waited = 0.0

    def __init__(self, sketch: Pool, photo: Pool, draws: Draws, words: Tensor) -> None:
        self.sketch, self.photo, self.draws, self.words = sketch, photo, draws, words

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1, repetition: int = 0) -> Batch:
        """See `Draws.of`."""
        draw = self.draws.of(step, size, rank, world, repetition)
        negative = None if draw.negative is None else self._rows(self.photo, draw.negative)
        return labelled(
            draw, self.words, self._rows(self.sketch, draw.sketch), self._rows(self.photo, draw.photo), negative
        )

    def close(self) -> None:
        """Do nothing: there is no prefetching to stop."""

    @staticmethod
    def _rows(pool: Pool, rows: Tensor) -> Tensor:
        return pool.features[rows.to(pool.features.device)]


def labelled(draw: Draw, words: Tensor, sketch: Tensor, photo: Tensor, negative: Tensor | None) -> Batch:
    """The batch of `draw` from its rows `sketch`, `photo` and `negative`, on the device of `words` (C, S)."""
    labels = draw.labels.to(words.device)
    others = None if draw.negative_labels is None else draw.negative_labels.to(words.device)
    return Batch(sketch=sketch, photo=photo, label=labels, word=words[labels], negative=negative, negative_label=others)
