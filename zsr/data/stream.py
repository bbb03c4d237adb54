"""Image streams: rolling reservoirs of row numbers, and batches that Ray Data decodes ahead of the trainer.

A reservoir holds no images. The rows of a batch follow from the rows' ids and labels, the seed and the step; the tasks
of the stream read and decode only those rows. So a batch does not depend on Ray's scheduling, a resumed run does not
decode earlier batches, and memory depends neither on the size of the data nor on that of the reservoirs.

Shapes: N rows, C classes, B rows of a rank's batch, R rows of all its modalities, S side of an image.
"""

import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from torch import Tensor

from zsr.artifact import Artifact
from zsr.batch import Batch
from zsr.cluster import connect, decoders
from zsr.data.decode import Pictures
from zsr.data.pictures import LISTED, Decoder, Work, list_rows
from zsr.data.sampling import Draw, Draws, labelled, seed_of
from zsr.errors import ConfigError

CHUNK: Final = 64 << 20  # bytes of decoded images per task; it yields them batch by batch
LEG: Final = 256  # tasks of the first dataset of a stream; each next one has twice as many
LONGEST: Final = 4096  # max tasks of a dataset
AHEAD: Final = 2  # batches prefetched from the object store


@dataclass(frozen=True)
class Rolling:
    """The reservoirs of one modality, as row numbers only.

    The rows have a fixed order, that of the shards. After n consumed rows, the reservoir of a class holds its last
    `capacity` rows before the n-th, cyclically; a class with at most `capacity` rows is always held completely. This is
    a closed form in n: nothing has to be replayed after a resume.

    Attributes:
        ids, pairs: (N,) int64, see `shards.Block`.
        places: (N, 2) int32, number of the shard and row in it.
        keys: (N,) int64, sorted: label * N + row number.
        totals: (C,) int64 rows of each class.
        capacity: max rows of a reservoir.
        start: rows consumed before step 0.
    """

    ids: np.ndarray
    pairs: np.ndarray
    places: np.ndarray
    keys: np.ndarray
    totals: np.ndarray
    capacity: int
    start: int

    @classmethod
    def of(cls, rows: pa.Table, classes: int, capacity: int, seed: int) -> "Rolling":
        """Reservoirs over `rows` from `pictures.list_rows`; the seed determines where the stream starts."""
        labels = rows.column("label").to_numpy()
        places = np.stack([rows.column(name).to_numpy() for name in ("shard", "row")], axis=1)
        return cls(
            ids=rows.column("id").to_numpy(),
            pairs=rows.column("pair").to_numpy(),
            places=places,
            keys=np.sort(labels * len(labels) + np.arange(len(labels))),
            totals=np.bincount(labels, minlength=classes),
            capacity=capacity,
            start=seed % max(1, len(labels)),
        )

    @property
    def sizes(self) -> Tensor:
        """(C,) int64: rows that each reservoir holds."""
        return torch.from_numpy(np.minimum(self.totals, self.capacity))

    @property
    def has_pairs(self) -> bool:
        """Whether any row names the photo that it belongs to."""
        return bool((self.pairs != self.ids).any())

    def draw(self, labels: Tensor, generator: torch.Generator, consumed: int) -> Tensor:
        """Sample a row of each label's reservoir uniformly, (B,) -> (B,) row numbers, after `consumed` rows."""
        label_B = labels.numpy()
        total_B = self.totals[label_B]
        first_B = np.cumsum(self.totals)[label_B] - total_B
        uniform_B = torch.rand(len(label_B), generator=generator, dtype=torch.float64).numpy()
        back_B = (uniform_B * np.minimum(total_B, self.capacity)).astype(np.int64)
        count = len(self.ids)
        passed_B = np.searchsorted(self.keys, label_B * count + (self.start + consumed) % count) - first_B
        return torch.from_numpy(self.keys[first_B + (passed_B - 1 - back_B) % total_B] % count)


@dataclass(frozen=True)
class Sides:
    """The rows of a stream: its shards by number, and the reservoirs of both modalities."""

    names: tuple[str, ...]
    sketch: Rolling
    photo: Rolling


def survey(data: Artifact, modalities: tuple[str, str], classes: tuple[str, ...], capacity: int, seed: int) -> Sides:
    """List the rows of two modalities, sketches first, without reading images.

    Args:
        capacity: max rows of a reservoir, per class and modality.

    Raises:
        ConfigError: a modality has no image of these classes.
        DamagedArtifact: see `pictures.shard`.
    """
    names = [entry.path for modality in modalities for entry in data.shards(modality)]
    items = [{"name": name, "number": number} for number, name in enumerate(names)]
    sides: list[Rolling] = []
    listed = _listed(data, items, classes)
    for modality in modalities:
        own = np.array([name.startswith(f"modality={modality}/") for name in names])
        rows = listed.filter(pa.array(own[listed.column("shard").to_numpy()], pa.bool_()))
        if not len(rows):
            raise ConfigError(
                f"data {data.digest[:12]}: no {modality} of the classes {list(classes)[:5]} ... has an image; "
                "check the split, or train on features"
            )
        sides.append(Rolling.of(rows, len(classes), capacity, seed_of(seed, len(sides))))
    return Sides(tuple(names), *sides)


def _listed(data: Artifact, items: list[dict[str, Any]], classes: tuple[str, ...]) -> pa.Table:
    """The rows of all shards, in order."""
    if not items:
        raise ConfigError(f"data {data.digest[:12]} has neither modality; it has {sorted(data.facts['rows'])}")
    connect()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        cast(Any, list_rows), fn_args=(data, classes), batch_size=1, batch_format="numpy"
    )
    tables = [cast(pa.Table, t) for t in dataset.iter_batches(batch_size=None, batch_format="pyarrow")]
    return pa.concat_tables([LISTED.empty_table(), *tables]).combine_chunks()


def first_pictures(data: Artifact, pictures: Pictures, sides: Sides, side: Rolling, count: int) -> Iterator[np.ndarray]:
    """About `count` images from the beginning of a modality, (at most 64, S, S, 3) uint8 at a time.

    They are a uniform sample, since rows are in hashed order. A remainder of fewer than 64 images is dropped.
    """
    places = side.places[:count]
    size = min(64, len(places))
    parts = np.split(places[: len(places) // size * size], len(places) // size)
    seeds = np.zeros(1, np.int64)
    items = [{"places": part.tobytes(), "seeds": seeds.tobytes(), "first": i} for i, part in enumerate(parts)]
    work = Work(data, sides.names, pictures, False, np.arange(size))
    with closing(_rows(_dataset(items, work, 1))) as rows:
        for table in rows:
            yield _pixels(table, pictures).copy()


class Stream:
    """Batches of images, prefetched by Ray tasks.

    Args:
        draws: samples the rows of each batch.
        words: (C, S) class embeddings, on the device of the batches.
        augment: crop and flip each image at random, differently for every batch.
        last_step: the last step for which `batch` will be called.
        repetitions: batches per step, see `repetitions_of`.

    Attributes:
        waited: seconds that callers of `batch` waited for data.
        decoded: images decoded for the batches returned so far.
    """

    def __init__(
        self,
        data: Artifact,
        pictures: Pictures,
        sides: Sides,
        draws: Draws,
        words: Tensor,
        *,
        augment: bool,
        last_step: int,
        repetitions: int = 1,
    ) -> None:
        self.data, self.pictures, self.sides, self.draws, self.words = data, pictures, sides, draws, words
        self.augment, self.last_step, self.repetitions = augment, last_step, repetitions
        self.waited = 0.0
        self.decoded = 0
        self._running: Generator[Batch] | None = None
        self._asked: tuple[int, ...] = ()
        self._step: list[Batch] = []

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1, repetition: int = 0) -> Batch:
        """The `size` rows of rank `rank` of the global batch of `step`.

        Consecutive steps are prefetched; any other step, as after a resume, restarts the prefetching there.
        """
        started = time.perf_counter()
        asked = (size, rank, world, step)
        if asked != self._asked:
            if self._running is None or self._asked != (size, rank, world, step - 1):
                self.close()
                self._running = self._batches(step, size, rank, world)
            self._step = [next(self._running) for _ in range(self.repetitions)]
            self._asked = asked
        self.waited += time.perf_counter() - started
        return self._step[repetition]

    def close(self) -> None:
        """Stop prefetching. Must be called at the end, see `_rows`."""
        if self._running is not None:
            self._running.close()
        self._running, self._asked, self._step = None, (), []

    def _batches(self, step: int, size: int, rank: int, world: int) -> Generator[Batch]:
        """Yield the batches of `step` and of all later steps, with the repetitions of a step in sequence."""
        sides = 2 + self.draws.triplets
        slots = np.concatenate([np.arange(size) + size * (world * side + rank) for side in range(sides)])
        work = Work(self.data, self.sides.names, self.pictures, self.augment, slots)
        each = max(1, CHUNK // (len(slots) * 3 * self.pictures.resize.size**2))
        turns = ((s, r) for s in range(step, self.last_step + 1) for r in range(self.repetitions))
        tasks = LEG
        while leg := list(islice(turns, each * tasks)):
            tasks = min(2 * tasks, LONGEST)
            plans = deque(self.draws.of(s, size, rank, world, r) for s, r in leg)
            items = [self._item(leg[i : i + each], list(plans)[i : i + each], i) for i in range(0, len(leg), each)]
            with closing(_rows(_dataset(items, work, world))) as rows:
                for number, table in enumerate(rows):
                    if table.column("number")[0].as_py() != number:
                        raise RuntimeError(f"batch {number} is out of order; Ray Data must preserve the order")
                    self.decoded += table.column("decoded")[0].as_py()
                    yield self._batch(plans.popleft(), table, size)

    def _item(self, turns: list[tuple[int, int]], plans: list[Draw], first: int) -> dict[str, Any]:
        """The input of one task: shard and row numbers of the images of its batches."""
        seeds = np.array([seed_of(self.draws.seed, *turn, 1) for turn in turns], np.int64)
        places = np.stack([self._places(plan) for plan in plans])
        return {"places": places.tobytes(), "seeds": seeds.tobytes(), "first": first}

    def _places(self, plan: Draw) -> np.ndarray:
        photos = plan.photo if plan.negative is None else torch.cat([plan.photo, plan.negative])
        return np.concatenate([self.sides.sketch.places[plan.sketch.numpy()], self.sides.photo.places[photos.numpy()]])

    def _batch(self, plan: Draw, table: pa.Table, size: int) -> Batch:
        pixels = _tensor(_pixels(table, self.pictures)).to(self.words.device)
        sketch, photo, *negative = torch.split(pixels, size)
        return labelled(plan, self.words, sketch, photo, negative[0] if negative else None)


def _dataset(items: list[dict[str, Any]], work: Work, ranks: int) -> Dataset:
    """A dataset that decodes `items` in order, with one Arrow row per batch and one block per row, on one of `ranks`.

    It uses a pool of actors instead of tasks: tasks run in any free process, so that every process would read every row
    group and verify every shard, and CPUs would idle between tasks.
    """
    connect()
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    # set before the map, which copies it; a task emits a block once it exceeds this size, so with every row
    dataset.context.target_max_block_size = len(work.slots) * 3 * work.pictures.resize.size**2
    actors, cpus = decoders(ranks)
    return dataset.map_batches(
        cast(Any, Decoder),
        fn_constructor_args=(work,),
        compute=ActorPoolStrategy(size=min(actors, len(items)), max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        batch_size=1,
        batch_format="numpy",
    )


def _rows(dataset: Dataset) -> Generator[pa.Table]:
    """Yield the rows of a dataset one by one. The generator must be closed, which stops Ray Data.

    Otherwise the garbage collector would stop it in an arbitrary thread; in one of Ray Data's own this deadlocks on a
    lock that the thread holds.
    """
    blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=AHEAD))
    with closing(cast(Any, blocks)):
        for block in blocks:
            table = cast(pa.Table, block)
            for row in range(len(table)):
                yield table.slice(row, 1)


def _pixels(table: pa.Table, pictures: Pictures) -> np.ndarray:
    """The images of a row, (R, S, S, 3), read-only: they are in the object store while they are referenced."""
    side = pictures.resize.size
    return cast(np.ndarray, table.column("pixels").chunk(0).flatten().to_numpy().reshape(-1, side, side, 3))


def _tensor(pixels: np.ndarray) -> Tensor:
    """The same memory as a tensor, without torch's warning: no consumer of a batch writes into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(pixels)
