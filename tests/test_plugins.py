"""A model, a data source and a backbone that another package brings are used like ours, by their entry points."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zsr.errors import ConfigError
from zsr.plugins import Registry

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = """
[zsr.models]
toy-mean = zsr_toys.model:Mean

[zsr.sources]
toy-shapes = zsr_toys.source:Shapes

[zsr.backbones]
toy-colors = zsr_toys.backbone:COLORS
"""
MODEL = '''
"""Nearest class mean: each modality is centered, and nothing else is learned."""

import torch

from zsr.models.protocol import Choice, ClosedForm, ModelConfig


class Config(ModelConfig):
    """Options.

    Attributes:
        power: what centered features are raised to.
    """

    power: float = 1.0


class Mean(ClosedForm):
    wants_words = False

    def __init__(self, config, inputs):
        super().__init__(inputs)
        self.config = config
        self.register_buffer("center", torch.zeros(inputs.photo_dim))

    @property
    def dim(self):
        return self.inputs.photo_dim

    def fit(self, rows, word, score):
        total, count = torch.zeros_like(self.center), 0
        for _, features, _ in rows:
            total, count = total + features.sum(0), count + len(features)
        self.center.copy_(total / count)
        return Choice({}, {})

    def embed(self, modality, features):
        centered = features - self.center
        return (centered.sign() * centered.abs() ** self.config.power).unsqueeze(1)
'''
SOURCE = '''
"""Squares of one color per class, listed in ROOT/colors.txt."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from zsr.data.sources import Item


@dataclass(frozen=True)
class Shapes:
    root: str

    @property
    def facts(self):
        return {"name": "toy-shapes", "attribution": ""}

    def items(self):
        for line in Path(self.root, "colors.txt").read_text().split():
            for modality in ("photo", "sketch"):
                for number in range(4):
                    yield Item(modality, f"{modality}/{line}/{number}", f"class_{line}", where=f"{line}:{number}")

    def load(self, item):
        color, _, number = item.where.partition(":")
        image = Image.new("RGB", (40, 40), color)
        image.putpixel((int(number), 0), (0, 0, 0))
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()

    def feature(self, item):
        return None
'''
BACKBONE = '''
"""The mean color of an image, through one linear layer."""

from torch import nn

from zsr.models.backbones import Entry, Input


def network(architecture):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8)), 8


COLORS = Entry(
    ("mean",),
    Input(shift=(0, 0, 0), divisor=(255, 255, 255), size=32, interpolation="bilinear", crop=None),
    network,
)
'''


@pytest.fixture
def toys(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has the package zsr-toys installed."""
    package, about = tmp_path / "site" / "zsr_toys", tmp_path / "site" / "zsr_toys-1.0.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    for name, text in (("__init__", ""), ("model", MODEL), ("source", SOURCE), ("backbone", BACKBONE)):
        (package / f"{name}.py").write_text(text)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: zsr-toys\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")])}


def test_model_source_and_backbone_of_another_package_work_as_ours(toys: dict[str, str], tmp_path: Path) -> None:
    def zsr(words: str, code: int = 0) -> dict[str, Any]:
        command = [sys.executable, "-m", "zsr", *words.split()]
        done = subprocess.run(command, cwd=tmp_path, env=toys, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
        results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return results

    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "colors.txt").write_text("red green blue yellow magenta")
    make = "import torch, zsr_toys.backbone as toys; torch.save(toys.network(None)[0].state_dict(), 'w.pt')"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, env=toys, check=True)
    made = zsr("prepare --source toy-shapes --input raw --output data")
    assert (made["kind"], made["rows"]["used"]) == ("data", 40)
    assert zsr("features --data data --backbone toy-colors --weights w.pt --output features")["dims"]["photo"] == 8
    inputs = "--data data --features features"
    model = "--model toy-mean --options.power 0.5 --split random:2:0 --validation-classes 0"
    zsr(f"train {inputs} {model} --num-workers 1 --output checkpoint")
    assert zsr(f"train {inputs} {model} --num-workers 2 --output of-two")["steps"] == 1  # by Ray Train's workers
    for modality in ("photo", "sketch"):
        zsr(f"embed {inputs} --checkpoint checkpoint --modality {modality} --output {modality}")
    zsr("index build --embeddings photo --queries sketch --index-dir index")
    zsr("search --index-dir index --queries sketch --k 4 --output found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(row["key"].split("/")[1] == row["query_key"].split("/")[1] for row in found)
    refused = zsr("prepare --source toy-shape --input raw --output data", code=2)
    assert "no source 'toy-shape'; there are emoji, folders" in refused["error"]
    assert "toy-shapes" in refused["error"]


def test_an_entry_point_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("broken", "zsr_nowhere:Thing", "zsr.models")
    nameless = EntryPoint("nameless", "zsr.errors", "zsr.models")
    ours = EntryPoint("mine", "zsr_nowhere:Other", "zsr.models")
    monkeypatch.setattr("zsr.plugins.entry_points", lambda group: [point, ours, nameless])
    registry: Registry[Any] = Registry("zsr.models", "model", {"mine": "zsr.errors:ZsrError"})
    assert list(registry) == ["mine", "broken", "nameless"]
    assert registry["mine"].__name__ == "ZsrError"  # ours, whatever others call theirs
    with pytest.raises(ConfigError, match="model 'broken': entry point zsr_nowhere:Thing does not load"):
        registry["broken"]
    with pytest.raises(ConfigError, match=r"model 'nameless': entry point .* does not load"):
        registry["nameless"]
    with pytest.raises(ConfigError, match="no model 'none'; there are mine, broken, nameless"):
        registry["none"]
