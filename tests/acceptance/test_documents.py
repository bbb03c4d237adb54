"""The commands of README and docs/ are run as they stand there, in their order, in a folder as a reader has it.

What they work on are the demo's emoji, as files of a user's own, and a small run of the demo itself.
"""

import io
import json
import shlex
import shutil
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import toy
from tests.acceptance.documents import DOCUMENTS, REASONS, ROOT, Block, blocks, loose_commands
from tests.pipeline import every_version, ok, read_all
from zsr.cli import main
from zsr.data.sources.emoji import Emoji

pytestmark = pytest.mark.usefixtures("ray_cluster")

EVERY = [block for document in DOCUMENTS for block in blocks(document)]
RUN = [block for block in EVERY if block.runs or block.language == "python"]
# names of things that words are known for, for some of the demo's classes
CLASSES = {
    "animal_mammal": "cat", "animal_bird": "bird", "animal_marine": "fish", "animal_bug": "insect",
    "plant_flower": "flower", "food_fruit": "fruit", "food_vegetable": "vegetable", "food_sweet": "cake",
    "drink": "drink", "transport_ground": "car", "transport_water": "boat", "transport_air": "airplane",
    "clothing": "coat", "musical_instrument": "guitar", "tool": "tool", "sport": "ball",
}  # fmt: skip


EACH = 5  # images of each class and modality


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """The folder in which the commands are given."""
    here = tmp_path_factory.mktemp("reader")
    _images(here)
    _demo(here / "runs" / "demo", here / "pictures")
    toy.write_features(here / "my_features")
    (here / "shop").mkdir()
    shutil.copy(here / "pictures" / "photo" / "cat" / "1.png", here / "shop" / "a.png")
    line = {"image": "a.png", "text": "a small cat", "label": "cat"}
    (here / "shop" / "items.jsonl").write_text(json.dumps(line) + "\n")
    return here


def _images(here: Path) -> None:
    """pictures/ to train on, gallery/ without classes, more/ that comes later, and a drawing."""
    source, taken = Emoji(), Counter[tuple[str, str]]()
    for item in source.items():
        name = CLASSES.get(str(item.label))
        which = (item.modality, str(name))
        if name is None or taken[which] > EACH or not (item.modality == "photo" or item.key.endswith("-500")):
            continue
        number, image = taken[which], source.load(item)
        taken[which] += 1
        folders = [here / "pictures" / item.modality / name]
        if number == EACH:
            folders = [here / "more" / "photo" / name, here / "gallery" / "photo"] if item.modality == "photo" else []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / (f"{name}.png" if number == EACH else f"{number}.png")).write_bytes(image)
    shutil.copy(here / "pictures" / "sketch" / "bird" / "1.png", here / "drawing.png")


def _demo(demo: Path, pictures: Path) -> None:
    """What the commands read of the demo's results, made of fewer images and without training."""
    data, features, semantics = (("--" + name, demo / name) for name in ("data", "features", "semantics"))
    checkpoint = ("--checkpoint", demo / "checkpoint-0")
    ok("prepare", "--source", "folders", "--input", pictures, "--output", data[1])
    ok("features", *data, "--size", 96, "--output", features[1])
    ok("semantics", *data, "--output", semantics[1])
    ok("train", *data, *features, *semantics, "--model", "raw", "--split", "random:3:0", "--validation-classes", 0,
       "--num-workers", 1, "--output", checkpoint[1])  # fmt: skip
    for modality in ("sketch", "photo"):
        output = demo / f"embeddings-{modality}"
        ok("embed", *data, *features, *checkpoint, "--modality", modality, "--output", output)
    ok("index", "build", "--embeddings", demo / "embeddings-photo", "--queries", demo / "embeddings-sketch",
       "--index-dir", demo / "index")  # fmt: skip


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs_as_it_stands(here: Path, monkeypatch: pytest.MonkeyPatch, block: Block) -> None:
    monkeypatch.chdir(here)
    if block.language == "python":
        exec(compile("\n".join(block.lines), str(block), "exec"), {})
        return
    for words in block.commands():
        assert words[0] == "zsr", f"{block}: {shlex.join(words)} is run by nobody; say why behind the fence"
        if "--help" in words:
            with pytest.raises(SystemExit) as ended, redirect_stdout(io.StringIO()):
                main(words[1:])
            assert ended.value.code in (0, None)
        else:
            ok(*words[1:])


def test_what_the_commands_made_can_be_read(here: Path) -> None:
    """After the blocks above: every file of every version of every artifact."""
    roots = [path.parent for path in sorted((here / "runs").rglob("versions")) if path.is_dir()]
    assert len(roots) > 15
    for root in roots:
        for artifact in every_version(root):
            read_all(artifact)
    for name in ("found.png", "sheet.png"):
        with Image.open(here / name) as image:
            assert np.asarray(image.convert("L")).std() > 10
    found = json.loads((here / "found.json").read_text())
    assert [row["rank"] for row in found] == list(range(1, 11))
    assert "</html>" in (here / "runs" / "report" / "report.html").read_text()
    # nothing but what the documents name was written beside the inputs
    inputs = {"pictures", "gallery", "more", "my_features", "shop", "drawing.png"}
    outputs = {"runs", "found.json", "found.png", "sheet.png", "exported", "neighbours.parquet", "contact_sheet.png"}
    assert {path.name for path in here.iterdir()} <= inputs | outputs


def test_every_command_stands_in_a_fence_that_says_whether_it_is_run() -> None:
    loose = [line for document in DOCUMENTS for line in loose_commands(document)]
    assert loose == []
    shells = [block for block in EVERY if block.language.split()[:1] == ["sh"]]
    assert {word for block in shells for word in block.language.split()[1:]} <= REASONS
    assert {document for document in DOCUMENTS if any(b.document == document and b.runs for b in shells)} >= {
        "README.md",
        "docs/guide.md",
        "docs/data.md",
        "docs/training.md",
        "docs/indexing.md",
        "docs/evaluation.md",
    }
    assert all((ROOT / document).is_file() for document in DOCUMENTS)
