"""Ridge: equal to the formula that it states, however its rows arrive; and the floors on real features."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from tests.models.helpers import INPUTS, batch, cut
from zsr.models import build
from zsr.models.protocol import Embedder, Inputs, Rows
from zsr.models.raw import Raw
from zsr.models.ridge import Ridge

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def ridge(*penalties: float) -> Ridge:
    return cast(Ridge, build("ridge", {"penalties": penalties}, INPUTS))


def words() -> Tensor:
    return torch.randn(len(INPUTS.classes), INPUTS.semantic_dim, generator=torch.Generator().manual_seed(5))


def blocks(size: int) -> Iterator[Rows]:
    data = batch(rows=40)
    for start in range(0, 40, size):
        part = cut(data, start, start + size)
        yield Rows("sketch", part.sketch, part.label)
        yield Rows("photo", part.photo, part.label)


@pytest.mark.parametrize("size", [40, 7])
def test_fit_equals_the_dual_formula_in_blocks_of_any_size(size: int) -> None:
    model = ridge(3.0)
    model.scale["photo"].get_buffer("mean").fill_(0.25)
    model.fit(blocks(size), words(), lambda: 0.0)
    data = batch(rows=40)
    z = (data.photo - 0.25).double()
    y = functional.normalize(words()).double()[data.label]
    y = y - y.mean(0)
    a = z.T @ torch.linalg.solve(z @ z.T + 3.0 * torch.eye(40).double(), y)
    assert_close(model.maps.get_parameter("photo.weight"), a.T.float())
    assert_close(model.encode("photo", data.photo)[:, 0], functional.normalize(z @ a).float())


def test_the_penalty_with_the_best_score_is_kept() -> None:
    model = ridge(1.0, 10.0, 100.0)
    scores = iter([0.2, 0.4, 0.3])
    choice = model.fit(blocks(40), words(), lambda: next(scores))
    assert choice.scores == {"penalty 1": 0.2, "penalty 10": 0.4, "penalty 100": 0.3}
    assert choice.options == {"penalties": [10.0]}
    alone = ridge(10.0)
    alone.fit(blocks(40), words(), lambda: 0.0)
    assert model.maps.get_parameter("sketch.weight").equal(alone.maps.get_parameter("sketch.weight"))


def test_a_class_without_rows_in_a_modality_does_not_change_the_other_targets() -> None:
    data = batch(rows=40)
    some = data.label != 0
    rows = [Rows("sketch", data.sketch, data.label), Rows("photo", data.photo[some], data.label[some])]
    model = ridge(3.0)
    model.fit(rows, words(), lambda: 0.0)
    z = data.photo[some].double()
    y = functional.normalize(words()).double()[data.label[some]]
    y = y - y.mean(0)
    a = torch.linalg.solve(z.T @ z + 3.0 * torch.eye(z.shape[1]).double(), z.T @ y)
    assert_close(model.maps.get_parameter("photo.weight"), a.T.float())


# -- real features ----------------------------------------------------------------------------------------------------


class Sketchy:
    """Features of 63 Sketchy classes, GloVe class vectors and the split."""

    def __init__(self) -> None:
        with np.load(DATA / "features/sketchy25_dev_effnetlite0_224px.npz") as stored:
            self.feature = {m: torch.from_numpy(stored[f"{m}_feat"]).float() for m in ("sketch", "photo")}
            self.name = {m: stored[f"{m}_label"].tolist() for m in ("sketch", "photo")}
        with np.load(DATA / "features/sketchy_class_glove50.npz") as stored:
            vectors = dict(zip(stored["classes"].tolist(), torch.from_numpy(stored["vec"]), strict=True))
        split = json.loads((DATA / "sketchy25/split.json").read_text())
        self.seen, self.unseen = sorted(split["seen"]), sorted(split["unseen"])
        self.word = torch.stack([vectors[name] for name in self.seen])
        self.inputs = Inputs(sketch_dim=1280, photo_dim=1280, semantic_dim=50, classes=tuple(self.seen))

    def rows(self, modality: str, classes: list[str]) -> tuple[Tensor, Tensor]:
        place = [i for i, name in enumerate(self.name[modality]) if name in classes]
        label = torch.tensor([classes.index(self.name[modality][i]) for i in place])
        return self.feature[modality][place], label

    def floor(self, model: Embedder) -> float:
        """mAP@all of unseen sketches against unseen photos, by cosine."""
        sketch, query = self.rows("sketch", self.unseen)
        photo, gallery = self.rows("photo", self.unseen)
        embedded = [functional.normalize(model.encode(m, f)[:, 0]) for m, f in (("sketch", sketch), ("photo", photo))]
        order = (embedded[0] @ embedded[1].T).argsort(dim=1, descending=True)
        hit = (gallery[order] == query[:, None]).double()
        precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1)
        return float(((precision * hit).sum(1) / hit.sum(1)).mean())


@pytest.fixture(scope="module")
def sketchy() -> Sketchy:
    if not DATA.is_dir():
        pytest.skip(f"development features are not at {DATA}")
    return Sketchy()


def test_raw_floor_on_sketchy(sketchy: Sketchy) -> None:
    model = build("raw", {}, sketchy.inputs)
    assert isinstance(model, Raw)
    assert sketchy.floor(model) == pytest.approx(0.246, abs=0.001)


def test_ridge_floor_on_sketchy(sketchy: Sketchy) -> None:
    model = build("ridge", {"penalties": (2000.0,)}, sketchy.inputs)
    assert isinstance(model, Ridge)
    rows = [Rows(m, *sketchy.rows(m, sketchy.seen)) for m in ("sketch", "photo")]
    for modality, features, _ in rows:
        model.scale[modality].fit(features.mean(0), features.std(0, correction=0))  # type: ignore[operator]
    model.fit(rows, sketchy.word, lambda: 0.0)
    assert sketchy.floor(model) == pytest.approx(0.358, abs=0.002)
