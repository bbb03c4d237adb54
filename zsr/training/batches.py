"""Feature scaling and training batches."""

from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from zsr.artifact import Artifact
from zsr.batch import Batch
from zsr.data.decode import Pictures
from zsr.data.sampling import Draws, Pool, Sampler, Side
from zsr.data.stream import Sides, Stream
from zsr.errors import ConfigError
from zsr.models.layers import Scale
from zsr.models.protocol import Embedder, Model, Scaling


class Batches(Protocol):
    """Source of a training loop's batches: rows in memory, or a stream of images."""

    @property
    def waited(self) -> float:
        """Seconds that calls of `batch` have waited for data."""
        ...

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1, repetition: int = 0) -> Batch:
        """The `size` rows of rank `rank` in the global batch of `step`; each repetition is a different batch."""
        ...

    def close(self) -> None:
        """Stop prefetching."""
        ...


def begin(model: Model, query: Pool, photo: Pool, words: Tensor, seed: int, *, paired: bool | None = None) -> Sampler:
    """Batches of rows in memory; arguments and errors as for `draws_of`."""
    return Sampler(query, photo, draws_of(model, query, photo, words, seed, paired=paired), words)


def begin_stream(
    model: Model,
    data: Artifact,
    pictures: Pictures,
    sides: Sides,
    words: Tensor,
    seed: int,
    *,
    paired: bool | None,
    augment: bool,
    last_step: int,
) -> Stream:
    """Batches of images that are decoded ahead of the steps; arguments and errors as for `draws_of` and `Stream`."""
    draws = draws_of(model, sides.sketch, sides.photo, words, seed, paired=paired)
    # `Engines.train_batch` asks for repetition 0, and for more where a phase repeats on fresh batches
    repetitions = max(phase.repeat if phase.fresh_batch else 1 for phase in model.phases)
    return Stream(data, pictures, sides, draws, words, augment=augment, last_step=last_step, repetitions=repetitions)


def draws_of(model: Model, query: Side, photo: Side, words: Tensor, seed: int, *, paired: bool | None = None) -> Draws:
    """Pass the class embeddings to a model, and set up the sampling that it requires.

    Args:
        words: (N, S) class embeddings, row i for label i.
        seed: of the batches.
        paired: sample the photo that belongs to the query. None: as in the model's paper, if any query names its photo.

    Raises:
        ConfigError: see `Draws`.
    """
    model.begin(words)
    return Draws(
        query,
        photo,
        seed,
        paired=model.paired and query.has_pairs if paired is None else paired,
        triplets=model.batch_kind == "triplets",
        negatives=model.negatives(words),
    )


class Sums:
    """Running mean, std and range of each feature over blocks of rows, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = np.zeros(0)
        self.square = np.zeros(0)
        self.least = np.zeros(0)
        self.most = np.zeros(0)

    def add(self, features: np.ndarray) -> None:
        """Add a block of rows (N, F)."""
        if not len(features):
            return
        wide = features.astype(np.float64)
        self.total = wide.sum(0) + (self.total if self.count else 0.0)
        self.square = np.square(wide).sum(0) + (self.square if self.count else 0.0)
        self.least = np.minimum(wide.min(0), self.least if self.count else np.inf)
        self.most = np.maximum(wide.max(0), self.most if self.count else -np.inf)
        self.count += len(features)

    def constants(self, scaling: Scaling, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments of `Scale.fit`, (F,) float32 each: mean and population std, or min and range.

        Raises:
            ConfigError: no row was added.
        """
        if self.count == 0:
            raise ConfigError(f"no {side} row of a training class has a feature; check the split and the features")
        if scaling == "unit":
            return torch.from_numpy(self.least).float(), torch.from_numpy(self.most - self.least).float()
        mean = self.total / self.count
        variance = np.maximum(self.square / self.count - np.square(mean), 0.0)
        return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(variance)).float()


def fit_scale(model: Embedder, side: str, sums: Sums) -> None:
    """Fit the feature scale of one side by the model's `scaling`. Raises ConfigError if `sums` has no row."""
    if model.scaling != "none":
        cast(Scale, model.scale[side]).fit(*sums.constants(model.scaling, side))
