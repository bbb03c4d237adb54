"""LCALE and CFSA between texts and pictures of classes that training never saw.

    python -m benchmarks.image_text wikipedia --input FOLDER --output OUT [--splits 20]
    python -m benchmarks.image_text grocery --input FOLDER --output OUT [--splits 5]

wikipedia: FOLDER holds the published lists and raw features (128 numbers a picture, 10 a text, in pairs). grocery:
FOLDER holds photo/CLASS and texts.jsonl with one description a class; pictures go through Lite0, texts through
MiniLM. The jobs prepare DATA, FEATURES and SEMANTICS; then each draw of unseen classes trains in this process, since
starting workers would take longer than the training: the sampler, the models and the DeepSpeed engines are those of
zsr train, on one rank. Trained are the seen classes (wikipedia: the train part of them), ranked the unseen ones
(wikipedia: the test part), mAP@all, I2T and T2I.

With so few seen classes none is left to choose a checkpoint on. The number of steps is therefore fixed beforehand; on
wikipedia it is 30 passes over the pairs of an average draw, the length of LCALE's warm-ups, for either model.

Two floors need no training. Chance is the closed form of a random ranking. "shuffled" is the model's own ranking with
the labels of the queries shuffled, in closed form too: the texts of a class lie close together, so any ranking of them
that looks at the text but not at the query is far above chance. What exceeds "shuffled" is what the query contributes.
A third is closed form: CCA of the pairs (wikipedia), ridge regression of photos onto their descriptions (grocery).
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from zsr import cluster, metrics
from zsr.artifact import open_artifact
from zsr.commands import features, prepare, semantics
from zsr.data.sampling import Pool, Reservoir, Sampler, seed_of
from zsr.data.semantics import class_vectors
from zsr.data.shards import Block, Rows, collect
from zsr.data.splits import draw as draw_classes
from zsr.models import build, configure
from zsr.models.protocol import Inputs, Model
from zsr.training.batches import Sums, begin, fit_scale
from zsr.training.config import TrainSettings
from zsr.training.engines import Engines, deepspeed_config, init_distributed
from zsr.training.loop import Place, train_step

SIDES: Final = (("sketch", "text"), ("photo", "photo"))  # a model's side, and the modality on it
ROWS_PER_CLASS: Final = 20_000
LCALE_HIDDEN: Final = ("photo_hidden", "sketch_hidden", "word_hidden")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on a set. `options` narrow the hidden layers, for time."""

    options: Mapping[str, Any]
    batch: int
    epochs: int
    steps_per_epoch: int


@dataclass(frozen=True)
class World:
    """A set and how it is used.

    Attributes:
        kind: of class vectors.
        unseen: classes a draw.
        splits: draws, unless the flags say otherwise.
        parts: key prefixes of the rows that train and of those that test; empty takes all rows for both.
        paired: a text has a photo of its own.
    """

    kind: str
    unseen: int
    splits: int
    parts: tuple[str, str]
    paired: bool
    recipes: Mapping[str, Recipe]


WORLDS: Final[Mapping[str, World]] = {
    # The batches are the papers': CADA-VAE's 50 and JFSE's 64, of 1,087 pairs a draw. The published widths are for
    # features of 4,096 numbers. LCALE's rate goes with its width: of 1.5e-4 and 1e-3 it was chosen on held-out
    # items of seen classes.
    "wikipedia": World(
        kind="glove",
        unseen=5,
        splits=20,
        parts=("train/", "test/"),
        paired=True,
        recipes={
            "lcale": Recipe(dict.fromkeys(LCALE_HIDDEN, (256, 256)) | {"lr": 1e-3}, 50, 30, 22),
            "cfsa": Recipe({"hidden": 256}, 64, 30, 17),
        },
    ),
    "grocery": World(
        kind="minilm",
        unseen=10,
        splits=5,
        parts=("", ""),
        paired=False,
        recipes={
            "lcale": Recipe(dict.fromkeys(LCALE_HIDDEN, (512, 512)) | {"lr": 5e-4}, 64, 30, 10),
            "cfsa": Recipe({"hidden": 512}, 64, 20, 10),
        },
    ),
}


@dataclass(frozen=True)
class Sides:
    """Paired rows: texts and photos of some classes and one part of the set."""

    sketch: Rows
    photo: Rows

    def only(self, part: str, classes: Sequence[str], names: Sequence[str]) -> "Sides":
        """The rows of some classes whose key begins with `part`; labels are then places in `classes`."""
        return Sides(*(_only(rows, part, classes, names) for rows in (self.sketch, self.photo)))


def _only(rows: Rows, part: str, classes: Sequence[str], names: Sequence[str]) -> Rows:
    place = np.array([classes.index(name) if name in classes else -1 for name in names])
    of_part = np.array([key.startswith(part) for key in rows.keys], dtype=bool)
    kept = np.flatnonzero((place[rows.labels] >= 0) & of_part)
    keys = tuple(rows.keys[row] for row in kept)
    return Rows(rows.ids[kept], rows.pairs[kept], place[rows.labels[kept]], rows.features[kept], keys)


@dataclass
class Scores:
    """One row of the table, and its value in each draw: I2T, T2I, their values with shuffled queries, and chance."""

    name: str
    values: list[tuple[float, ...]] = field(default_factory=list)


# ---- training --------------------------------------------------------------------------------------------------------


def train(
    world: World, name: str, train_on: Sides, words: NDArray[np.float32], classes: Sequence[str], seed: int
) -> Model:
    """Model `name` after its epochs, fitted to `train_on`."""
    recipe = world.recipes[name]
    inputs = Inputs(
        sketch_dim=train_on.sketch.features.shape[1],
        photo_dim=train_on.photo.features.shape[1],
        semantic_dim=words.shape[1],
        classes=tuple(classes),
        query="text",
    )
    torch.manual_seed(seed_of(seed, 0))
    model = cast(Model, build(name, configure(name, recipe.options).model_dump(), inputs))
    pools = {side: pool(model, side, getattr(train_on, side), len(classes), seed) for side, _ in SIDES}
    vectors = torch.from_numpy(words)
    sampler = begin(model, pools["sketch"], pools["photo"], vectors, seed_of(seed, 1), paired=world.paired)
    run(model, sampler, recipe, seed)
    return model


def pool(model: Model, side: str, rows: Rows, classes: int, seed: int) -> Pool:
    """The rows that batches are drawn from, and the model's scale fitted on them."""
    held, sums = Reservoir(classes, ROWS_PER_CLASS, seed_of(seed, 2)), Sums()
    held.add(Block(rows.ids, rows.pairs, rows.labels, rows.features))
    sums.add(rows.features)
    fit_scale(model, side, sums)
    return held.finish("cpu")


def run(model: Model, sampler: Sampler, recipe: Recipe, seed: int) -> None:
    """The steps of the training loop, without its checkpoints."""
    engines = Engines(model, recipe.batch, deepspeed_config())
    settings = TrainSettings(steps_per_epoch=recipe.steps_per_epoch, batch_size=recipe.batch, seed=seed)
    model.train()
    for step in range(1, recipe.epochs * recipe.steps_per_epoch + 1):
        train_step(engines, sampler, settings, Place(0, 1, "cpu"), step)


# ---- floors ----------------------------------------------------------------------------------------------------------


def cca(train_on: Sides, parts: int = 9) -> Callable[[str, NDArray[np.float32]], Tensor]:
    """Canonical correlation analysis of the trained pairs: what maps a side's features (N, F) to (N, parts).

    With C the covariances, U S V' = C_tt^-1/2 C_tp C_pp^-1/2: texts go by C_tt^-1/2 U, photos by C_pp^-1/2 V.
    """
    place = {int(identity): row for row, identity in enumerate(train_on.photo.ids)}
    partner = [place[int(pair)] for pair in train_on.sketch.pairs]
    text = train_on.sketch.features.astype(np.float64)
    photo = train_on.photo.features[partner].astype(np.float64)
    means = {"sketch": text.mean(0), "photo": photo.mean(0)}
    text, photo = text - means["sketch"], photo - means["photo"]
    roots = inverse_root(text.T @ text / len(text)), inverse_root(photo.T @ photo / len(text))
    left, _, right = np.linalg.svd(roots[0].T @ (text.T @ photo / len(text)) @ roots[1], full_matrices=False)
    maps = {"sketch": roots[0] @ left[:, :parts], "photo": roots[1] @ right[:parts].T}
    return lambda side, features: torch.from_numpy((features - means[side]) @ maps[side])


def regressed(train_on: Sides, penalty: float = 1000.0) -> Callable[[str, NDArray[np.float32]], Tensor]:
    """Photos (N, F) by ridge regression onto the description of their class, texts less the mean of the trained ones.

    With Z the standardised trained photos and Y their centred descriptions, A = Z'(ZZ' + penalty I)^-1 Y.
    """
    first = {int(label): row for row, label in reversed(list(enumerate(train_on.sketch.labels)))}
    texts = train_on.sketch.features[[first[int(label)] for label in train_on.photo.labels]].astype(np.float64)
    photos = train_on.photo.features.astype(np.float64)
    mean, deviation, middle = photos.mean(0), photos.std(0) + 1e-3, texts.mean(0)
    z = (photos - mean) / deviation
    weights = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), texts - middle)
    ways = {"sketch": lambda x: x - middle, "photo": lambda x: (x - mean) / deviation @ weights}
    return lambda side, features: torch.from_numpy(ways[side](features))


def inverse_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """A with A' covariance A = I, (F, F'); directions without variance are left out (topics of a text sum to 1)."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-6 * values.max()
    return np.asarray(vectors[:, kept] / np.sqrt(values[kept]))


# ---- scores ----------------------------------------------------------------------------------------------------------


def scored(text: Tensor, photo: Tensor, test: Sides) -> tuple[float, ...]:
    """I2T, T2I, the same with shuffled queries, and the chance of each."""
    t, p = test.sketch.labels.astype(str), test.photo.labels.astype(str)
    chances = [metrics.chance(metrics.count_relevant(*pair), len(pair[1]))["mAP@all"] for pair in ((p, t), (t, p))]
    return (
        average_precision(photo, text, p, t),
        average_precision(text, photo, t, p),
        shuffled(photo, text, p, t),
        shuffled(text, photo, t, p),
        *chances,
    )


def average_precision(query: Tensor, gallery: Tensor, wanted: NDArray[np.str_], labels: NDArray[np.str_]) -> float:
    """mAP@all by cosine."""
    return float(metrics.rank_scores(query, gallery, wanted, labels, "cosine", (10,)).ap.mean())


def shuffled(query: Tensor, gallery: Tensor, wanted: NDArray[np.str_], labels: NDArray[np.str_]) -> float:
    """The mean of mAP@all over all ways to shuffle the queries' labels: every query meets every class by its share."""
    names, counts = np.unique(wanted, return_counts=True)
    scores = [average_precision(query, gallery, np.full(len(wanted), name), labels) for name in names]
    return float(np.average(scores, weights=counts))


def standardised(embedded: Tensor) -> Tensor:
    """Each column to mean 0 and deviation 1 over the test items, as JFSE's released code does: it looks at the test."""
    return (embedded - embedded.mean(0)) / (embedded.std(0) + 1e-9)


# ---- table -----------------------------------------------------------------------------------------------------------


def measure(flags: argparse.Namespace, world: World) -> list[Scores]:
    """Every row over every draw."""
    sides, words, names = load(flags, world)
    floor, fit = ("cca", cca) if world.paired else ("ridge", regressed)
    table = {name: Scores(name) for name in (floor, *flags.models)}
    table |= {f"{name}, z-scored": Scores(f"{name}, z-scored") for name in flags.models}
    for seed in range(flags.splits or world.splits):
        unseen = draw_classes(names, world.unseen, seed)
        seen = tuple(name for name in names if name not in unseen)
        train_on, test = sides.only(world.parts[0], seen, names), sides.only(world.parts[1], unseen, names)
        mapped = fit(train_on)
        text, photo = (mapped(s, getattr(test, s).features) for s, _ in SIDES)
        table[floor].values.append(scored(text, photo, test))
        for name in flags.models:
            model = train(world, name, train_on, words[[names.index(c) for c in seen]], seen, seed)
            text, photo = (model.encode(m, torch.from_numpy(getattr(test, s).features))[:, 0] for s, m in SIDES)
            table[name].values.append(scored(text, photo, test))
            table[f"{name}, z-scored"].values.append(scored(standardised(text), standardised(photo), test))
        print(f"draw {seed}, unseen {', '.join(unseen)}: I2T, T2I", flush=True)
        print("   ", "; ".join(f"{row.name} {row.values[-1][0]:.3f} {row.values[-1][1]:.3f}" for row in table.values()))
    return list(table.values())


def load(flags: argparse.Namespace, world: World) -> tuple[Sides, NDArray[np.float32], tuple[str, ...]]:
    """Rows of every class, the class vectors, and the class names; made by the jobs, or left by an earlier call."""
    at = {name: flags.output / name for name in ("data", "features", "semantics")}
    if flags.set == "wikipedia":
        prepare.work(
            prepare.Config(source="wikipedia", input=flags.input, output=at["data"], features_output=at["features"])
        )
    else:
        prepare.work(prepare.Config(source="pairs", input=flags.input, output=at["data"], rows_per_shard=500))
        features.work(features.Config(data=at["data"], output=at["features"]))
    semantics.work(semantics.Config(data=at["data"], kinds=(world.kind,), output=at["semantics"]))
    data, vectors, words = (open_artifact(at[kind], kind) for kind in at)
    names = tuple(sorted(data.facts["classes"]))
    rows = [collect(data, vectors, modality, names) for _, modality in SIDES]
    cluster.disconnect()  # the models train in this process
    return Sides(*rows), class_vectors(words, names), names


def show(row: Scores) -> str:
    """One line of the table."""
    values = np.array(row.values)
    means = values.mean(0)
    columns = [f"{means[way]:.3f} ± {error(values[:, way]):.3f}" for way in (0, 1)]
    columns += [difference(values[:, way] - values[:, way + 4]) for way in (0, 1)]
    columns += [f"{means[way]:.3f}" for way in (2, 3)]
    columns += [difference(values[:, way] - values[:, way + 2]) for way in (0, 1)]
    return f"| {row.name} | {' | '.join(columns)} |"


def error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean over draws."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def difference(values: NDArray[np.float64]) -> str:
    """Mean difference, and how many of its standard errors that is."""
    return f"{values.mean():+.3f} ({values.mean() / error(values):.1f} s.e.)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(WORLDS))
    parser.add_argument("--input", type=Path, required=True, help="folder of the set")
    parser.add_argument("--output", type=Path, required=True, help="takes DATA, FEATURES and SEMANTICS")
    parser.add_argument("--splits", type=int, help="draws of the unseen classes, at least 2")
    parser.add_argument("--models", nargs="*", default=["lcale", "cfsa"], choices=["lcale", "cfsa"])
    flags = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; Ray Train sets it for its workers
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    init_distributed("gloo")
    started = time.monotonic()
    rows = measure(flags, WORLDS[flags.set])
    values = np.array(rows[0].values)
    i2t, t2i = values[:, 4:].mean(0)
    print(f"\n{len(values)} draws, {time.monotonic() - started:.0f} s; chance I2T {i2t:.3f}, T2I {t2i:.3f}\n")
    print("| row | I2T | T2I | I2T over chance | T2I over chance | I2T shuffled | T2I shuffled | over it | over it |")
    print("|---|---|---|---|---|---|---|---|---|", *map(show, rows), sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
