"""A model with an image tower in front: what it eats, what trains, and at which rate."""

import pytest
import torch

from tests.models.helpers import CLASSES, optimizers, step
from zsr.batch import Batch
from zsr.errors import ConfigError
from zsr.models import backbones, build
from zsr.models.protocol import Inputs, Model, Tower


def inputs(*, rate: float = 0.5, shared: bool = True, tune: str = "all") -> Inputs:
    """Inputs of a model behind the `tiny` backbone at 16 pixels."""
    tower = Tower(architecture=backbones.architecture("tiny"), size=16, shared=shared, rate=rate, tune=tune)
    return Inputs(sketch_dim=64, photo_dim=64, semantic_dim=7, classes=CLASSES, tower=tower)


def pictures(rows: int = 8) -> Batch:
    """Triplets of random pictures."""
    draw = torch.Generator().manual_seed(0)

    def pixels() -> torch.Tensor:
        return torch.randint(0, 255, (rows, 16, 16, 3), dtype=torch.uint8, generator=draw)

    label = torch.arange(rows) % len(CLASSES)
    word = torch.randn(len(CLASSES), 7, generator=draw)[label]
    return Batch(pixels(), pixels(), label, word, negative=pixels(), negative_label=(label + 1) % len(CLASSES))


def model(name: str = "doodle2search", *, rate: float = 0.5, shared: bool = True, tune: str = "all") -> Model:
    torch.manual_seed(0)
    made = build(name, {}, inputs(rate=rate, shared=shared, tune=tune))
    assert isinstance(made, Model)
    return made.train()


def moved(made: Model) -> set[str]:
    """The first parts of the names of the parameters that a step changed."""
    return {".".join(name.split(".")[:2]) for name in changed(made)}


def changed(made: Model) -> list[str]:
    """The names of the parameters that a step changed."""
    before = {name: value.clone() for name, value in made.state_dict().items()}
    step(made, optimizers(made), pictures())
    return [name for name, value in made.state_dict().items() if not value.equal(before[name])]


def test_one_tower_for_both_or_one_each() -> None:
    assert {"towers.both"} == {name for name in moved(model()) if name.startswith("towers")}
    assert {"towers.sketch", "towers.photo"} == {n for n in moved(model(shared=False)) if n.startswith("towers")}


def test_a_rate_of_zero_freezes_the_tower() -> None:
    assert not {name for name in moved(model(rate=0.0)) if name.startswith("towers")}


def test_parts_of_a_tower_are_named_by_kind_or_by_pattern() -> None:
    norms = [name for name in changed(model(tune="norms")) if name.startswith("towers")]
    assert {name.rsplit(".", 2)[-2] for name in norms} == {"1", "4", "7"}
    last = [name for name in changed(model(tune=r"network\.6\.")) if name.startswith("towers")]
    assert {name.rsplit(".", 2)[-2] for name in last} == {"6"}
    with pytest.raises(ConfigError, match="matches no parameter of the tower"):
        assert model(tune="layer9").trained


def test_the_tower_has_its_share_of_the_rate() -> None:
    (group,) = model().trained.values()
    fast, slow = group.build().param_groups
    assert slow["lr"] == 0.5 * fast["lr"]
    assert len(slow["params"]) == len(list(model().towers.parameters()))


def test_several_phases_cannot_train_a_tower() -> None:
    with pytest.raises(ConfigError, match="SemPcyc takes 3 steps per batch"):
        assert model("sem-pcyc").trained
    assert model("sem-pcyc", rate=0.0).trained


def test_pictures_are_encoded_one_by_one() -> None:
    made, photo = model(), pictures().photo
    alone = torch.cat([made.encode("photo", photo[row : row + 1]) for row in range(len(photo))])
    torch.testing.assert_close(made.encode("photo", photo), alone)
