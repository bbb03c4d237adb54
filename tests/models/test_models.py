"""What holds for every model of the registry."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.helpers import INPUTS, batch, optimizers, step, triplets
from zsr.errors import ConfigError
from zsr.models import MODELS, build, configure
from zsr.models.protocol import Inputs, Model
from zsr.models.sem_pcyc import RELEASED

SQUARE = Inputs(sketch_dim=12, photo_dim=12, semantic_dim=7, classes=INPUTS.classes)
STEPPED = [name for name, entry in MODELS.items() if issubclass(entry.model, Model)]
SMALL = {name: dict(entry.small) for name, entry in MODELS.items()}


def test_models_import_neither_ray_nor_deepspeed_nor_pyarrow() -> None:
    heavy = "[name for name in ('ray', 'deepspeed', 'pyarrow') if name in sys.modules]"
    code = f"import sys; from zsr.models import MODELS; list(MODELS.values()); print({heavy})"
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODELS)
def test_both_modalities_embed_into_one_space_as_parts(name: str) -> None:
    model = build(name, SMALL.get(name, {}), SQUARE)
    for modality in ("sketch", "photo"):
        assert model.encode(modality, torch.randn(5, 12)).shape == (5, 1, model.dim)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_options_rebuild_the_model(name: str) -> None:
    first = build(name, SMALL.get(name, {}), SQUARE)
    again = build(name, configure(name, SMALL.get(name, {})).model_dump(mode="json"), SQUARE)
    again.load_state_dict(first.state_dict())
    features = torch.randn(5, 12)
    assert again.encode("photo", features).equal(first.encode("photo", features))


@pytest.mark.parametrize("name", MODELS)
def test_encode_keeps_the_mode_that_it_found(name: str) -> None:
    model = build(name, SMALL.get(name, {}), SQUARE).train()
    model.encode("photo", torch.randn(5, 12))
    assert model.training


@pytest.mark.parametrize("name", STEPPED)
def test_same_seed_same_bits(name: str) -> None:
    def trained() -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        model = build(name, SMALL.get(name, {}), INPUTS)
        assert isinstance(model, Model)
        steppers = optimizers(model.train())
        draw = triplets if model.batch_kind == "triplets" else batch
        for number in range(3):
            step(model, steppers, draw(seed=number), seed=number)
        return model.state_dict()

    first, second = trained(), trained()
    assert all(value.equal(second[key]) for key, value in first.items())


def test_raw_is_the_identity() -> None:
    features = torch.randn(5, 12)
    model = build("raw", {}, SQUARE)
    assert model.scaling == "none"
    assert torch.allclose(model.encode("sketch", features)[:, 0], features)


def test_raw_refuses_modalities_of_different_width() -> None:
    with pytest.raises(ConfigError, match="sketches have 10 dimensions and photos 14"):
        build("raw", {}, INPUTS)


@pytest.mark.parametrize(
    ("name", "options", "preset", "message"),
    [
        ("sem-pcyk", {}, None, "no model .*; there are .*sem-pcyc"),
        ("sem-pcyc", {}, "relaesed", "presets are .*released"),
        ("sem-pcyc", {"dims": 3}, None, "dims: Extra inputs.*options are .*dim"),
        ("sem-pcyc", {"dim": 0}, None, "dim: Input should be greater than or equal to 2"),
        ("ridge", {"penalties": ()}, None, "penalties"),
    ],
)
def test_wrong_options_are_refused_by_name(
    name: str, options: dict[str, Any], preset: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(name, options, preset)


def test_options_lie_on_top_of_a_preset() -> None:
    assert configure("sem-pcyc", {"dim": 32}, "released") == RELEASED.model_copy(update={"dim": 32})
