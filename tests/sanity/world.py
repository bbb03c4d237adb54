"""A small world with a known answer: paired sketches and photos of classes, some never trained, and how it is ranked.

60 classes, of which the first 48 are seen, each with a class vector a in R^20 and 60 instances with a code u in R^8:

    photo = relu(a W_p + 0.7 u V_p + 0.5 e + 0.5)        sketch likewise, with maps of its own

so a linear map leads from the class vector into either modality, both show the same instance, and the gap between them
is real: raw features rank unseen classes near chance. Everything is a function of the seed.

Shapes: R rows, F features, S class vector, N classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tests.models.helpers import optimizers, step
from zsr.batch import Batch
from zsr.data.sampling import Pool, Sampler, seed_of
from zsr.metrics import mean_average_precision
from zsr.models import build
from zsr.models.protocol import Embedder, Inputs, Model
from zsr.training.batches import Sums, begin, fit_scale

CLASSES: Final = 60
SEEN: Final = 48
EACH: Final = 60
WORDS: Final = 20
FEATURES: Final = 64
CODE: Final = 8


@dataclass(frozen=True)
class World:
    """Rows of both modalities, class after class; row i of one is the partner of row i of the other.

    Attributes:
        word_NS: class vectors, unseen classes last.
        label_R: class of each row.
        features: (R, F) by modality.
    """

    word_NS: Tensor
    label_R: Tensor
    features: dict[str, Tensor]

    @property
    def unseen_R(self) -> Tensor:
        """Whether each row is of an unseen class."""
        return self.label_R >= SEEN


def world(seed: int) -> World:
    """The world of a seed."""
    rng = np.random.default_rng(seed)
    word = rng.standard_normal((CLASSES, WORDS))
    to_photo, to_sketch = rng.standard_normal((2, WORDS, FEATURES)) / np.sqrt(WORDS)
    instance_photo, instance_sketch = rng.standard_normal((2, CODE, FEATURES)) / np.sqrt(CODE)
    label = np.repeat(np.arange(CLASSES), EACH)
    code = rng.standard_normal((len(label), CODE))

    def seen_as(of_class: np.ndarray, of_instance: np.ndarray) -> Tensor:
        noise = rng.standard_normal((len(label), FEATURES))
        made = word[label] @ of_class + 0.7 * code @ of_instance + 0.5 * noise + 0.5
        return torch.from_numpy(np.maximum(made, 0).astype(np.float32))

    features = {"photo": seen_as(to_photo, instance_photo), "sketch": seen_as(to_sketch, instance_sketch)}
    return World(torch.from_numpy(word.astype(np.float32)), torch.from_numpy(label), features)


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained on a world.

    Attributes:
        model, options: as the registry knows them.
        epochs, steps: of training; `steps` an epoch.
        paired: whether a sketch comes with its own photo, or with any of its class; None as the model's paper does.
        shuffled_words: give every seen class the vector of another one.
        shuffled_labels: let the photos of a seen class be those of many classes.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    steps: int = 20
    batch: int = 128
    paired: bool | None = None
    shuffled_words: bool = False
    shuffled_labels: bool = False


def trained(recipe: Recipe, of: World, seed: int) -> Model:
    """The model after training, or as it was initialised where the recipe has no epoch."""
    torch.manual_seed(seed_of(seed, 0))
    names = tuple(f"{number:02d}" for number in range(SEEN))
    inputs = Inputs(sketch_dim=FEATURES, photo_dim=FEATURES, semantic_dim=WORDS, classes=names)
    model = build(recipe.model, recipe.options, inputs)
    assert isinstance(model, Model)
    sampler = prepared(recipe, model, of, seed)
    steppers = optimizers(model.train())
    for number in range(recipe.epochs * recipe.steps):
        epoch, index = divmod(number, recipe.steps)

        def draw(repetition: int, number: int = number, epoch: int = epoch, index: int = index) -> Batch:
            return sampler.batch(number, recipe.batch, repetition=repetition).map(epoch=epoch, index=index)

        step(model, steppers, draw(0), seed_of(seed, number), draw)
    return model.eval()


def prepared(recipe: Recipe, model: Model, of: World, seed: int) -> Sampler:
    """Batches of the seen rows; scales and whatever else begins with the class vectors are fitted, as in a run."""
    shuffle = torch.Generator().manual_seed(seed)
    words = of.word_NS[:SEEN]
    if recipe.shuffled_words:
        words = words[torch.randperm(SEEN, generator=shuffle)]
    pools = {side: seen(of, side) for side in ("sketch", "photo")}
    if recipe.shuffled_labels:
        other = torch.randperm(len(pools["photo"].features), generator=shuffle)
        pools["photo"] = replace(pools["photo"], features=pools["photo"].features[other])
    for side, pool in pools.items():
        sums = Sums()
        sums.add(pool.features.numpy())
        fit_scale(model, side, sums)
    return begin(model, pools["sketch"], pools["photo"], words, seed_of(seed, 1), paired=recipe.paired)


def seen(of: World, side: str) -> Pool:
    """The seen rows of a modality; a sketch's pair is the photo with its own number."""
    seen_R = ~of.unseen_R
    number = np.flatnonzero(seen_R.numpy())
    ids = number + len(seen_R) if side == "sketch" else number
    return Pool(of.features[side][seen_R], ids, number, torch.full((SEEN,), EACH))


# -- ranking -----------------------------------------------------------------------------------------------------------


def zero_shot(model: Embedder, of: World, generalised: bool = False) -> float:
    """mAP@all of unseen sketches among unseen photos, or among all photos."""
    gallery_R = torch.ones_like(of.unseen_R) if generalised else of.unseen_R
    return mean_average_precision(
        model.encode("sketch", of.features["sketch"][of.unseen_R]),
        model.encode("photo", of.features["photo"][gallery_R]),
        of.label_R[of.unseen_R].numpy(),
        of.label_R[gallery_R].numpy(),
        model.metric,
    )


def floors(of: World, seed: int) -> dict[str, float]:
    """What needs no training, by cosine on unseen rows.

    raw ranks features as they are; least squares maps sketches to photos first; the oracle asks with the sketch's own
    photo, which is in the gallery; and shuffled labels are raw features under labels that mean nothing.
    """
    unseen_R = of.unseen_R
    sketch, photo = of.features["sketch"], of.features["photo"]
    one = torch.cat([sketch, torch.ones(len(sketch), 1)], 1)
    made = one @ torch.linalg.lstsq(one[~unseen_R], photo[~unseen_R]).solution
    label = of.label_R[unseen_R].numpy()
    mixed = np.random.default_rng(seed).permutation(label)

    def score(query: Tensor, names: np.ndarray) -> float:
        return mean_average_precision(query[unseen_R], photo[unseen_R], names, names)

    return {
        "raw cosine": score(sketch, label),
        "least squares": score(made, label),
        "oracle": score(photo, label),
        "shuffled test labels": score(sketch, mixed),
    }
