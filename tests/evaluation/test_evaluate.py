"""`zsr evaluate` on small generated features: the protocols, several splits, codes, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import toy
from tests.pipeline import features_only, job, ok
from zsr.artifact import Artifact, Store, open_artifact
from zsr.checkpoint import open_model
from zsr.errors import ConfigError, Leakage
from zsr.evaluation import retrain
from zsr.evaluation.compare import by_split, named
from zsr.evaluation.eval_set import Bench, Pool, Task, draw
from zsr.evaluation.protocol import Evaluation

pytestmark = pytest.mark.usefixtures("ray_cluster")

EACH = 12  # items of a class and modality in the generated set
RIDGE = ("--model", "ridge", "--num-workers", 1, "--validation-classes", 2)


class Set:
    """Artifacts of a generated set, and ridge checkpoints of two random splits."""

    def __init__(self, root: Path) -> None:
        self.flags = features_only(root, toy.write_features(root / "raw", each=EACH))
        self.checkpoints = [root / f"ridge-{number}" for number in range(2)]
        for number, path in enumerate(self.checkpoints):
            ok("train", *self.flags, "--split", f"random:3:{number}", "--output", path, *RIDGE)
        self.opened = [open_artifact(path, "checkpoint") for path in self.checkpoints]

    def bench(self, task: Task = Task(), checkpoints: tuple[Artifact, ...] = ()) -> Bench:  # noqa: B008
        paths = dict(zip(map(str, self.flags[::2]), map(str, self.flags[1::2]), strict=True))
        opened: dict[str, Any] = {
            name: open_artifact(paths[f"--{name}"], name) for name in ("data", "features", "semantics")
        }
        return Bench(checkpoints=checkpoints or (self.opened[0],), task=task, **opened)

    def measure(self, task: Task) -> Evaluation:
        return self.bench(task).measure("ridge", open_model(self.opened[0]), self.opened[0].facts["saw"], (10,))

    def report(self, output: Path, *flags: object) -> Any:
        ok("evaluate", *self.flags, "--checkpoint", self.checkpoints[0], "--output", output, *flags)
        return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("evaluate"))


def test_generalised_adds_seen_classes_to_the_gallery_and_seen_queries_beside(tmp_path: Path, made: Set) -> None:
    report = made.report(tmp_path, "--protocol", "generalised", "--title", "Shapes <by hand>")
    row = report["rows"][0]
    assert (row["queries"], row["gallery"]) == (3 * EACH, 10 * EACH)
    assert row["generalised"]["seen_queries"] == 7 * EACH
    seen, unseen = row["generalised"]["seen"]["mAP@all"], row["scores"]["mAP@all"]
    assert row["generalised"]["harmonic"]["mAP@all"] == pytest.approx(2 * seen * unseen / (seen + unseen))
    page = (tmp_path / "report.html").read_text()
    assert f"{row['generalised']['harmonic']['mAP@all']:.3f}" in page
    assert "Yelamarthi" in page
    assert "<title>Shapes &lt;by hand&gt;</title>" in page


def test_the_released_generalised_rule_adds_a_fifth_of_seen_items(made: Set) -> None:
    found = made.measure(Task(protocol="generalised-sempcyc"))
    assert found.generalised is not None
    assert found.generalised.seen_queries == round(0.2 * 3 * EACH)
    assert found.gallery == 3 * EACH + round(0.2 * 3 * EACH)


def test_few_shot_trains_on_the_shots_and_never_evaluates_them(tmp_path: Path, made: Set) -> None:
    report = made.report(tmp_path, "--protocol", "few-shot", "--shots", 4)
    row = report["rows"][0]
    assert report["title"] == "Few-shot retrieval: sketch to photo"
    assert "not seen in training" not in (tmp_path / "report.html").read_text()
    assert (row["queries"], row["gallery"]) == (3 * (EACH - 4), 3 * (EACH - 4))
    config = report["configuration"]["ridge"]
    assert len(config["features"]["unseen_items_trained_on"]) == 3 * 2 * 4
    assert set(report["unseen"]) <= set(config["split"]["training"])
    assert row["scores"]["mAP@all"] > made.measure(Task()).scores["mAP@all"]


def test_a_few_shot_draw_leaves_an_item_to_evaluate(tmp_path: Path, made: Set) -> None:
    bench = made.bench(Task(protocol="few-shot", shots=EACH))
    with pytest.raises(ConfigError, match=f"has {EACH} sketch items; at least {EACH + 1} are needed"):
        retrain.few_shot(bench, Store.at(tmp_path))


def test_a_retrained_model_keeps_stage_and_precision_of_its_checkpoint(tmp_path: Path, made: Set) -> None:
    flags = (*RIDGE, "--split", "random:3:0", "--zero-stage", 2, "--precision", "bf16")
    ok("train", *made.flags, "--output", tmp_path / "sharded", *flags)
    checkpoint = open_artifact(tmp_path / "sharded", "checkpoint")
    bench = made.bench(checkpoints=(checkpoint,))
    found = retrain.again(bench, checkpoint, Store.at(tmp_path / "again"), retrain.random_split(bench, 3))
    assert found.config["split"]["source"] == "random:3:3"
    assert found.config["deepspeed"] == checkpoint.config["deepspeed"]
    assert found.config["deepspeed"]["zero_optimization"]["stage"] == 2
    assert found.config["deepspeed"]["torch_autocast"]["enabled"]


def test_several_splits_give_mean_and_deviation(tmp_path: Path, made: Set) -> None:
    flags = ("--checkpoint", *made.checkpoints, "--splits", 1)
    results = ok("evaluate", *made.flags, *flags, "--output", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    splits = report["splits"]
    # the random split 0 is the first checkpoint's own, so two splits are told apart
    assert set(splits["chance"]) == {"random:3:0", "random:3:1"}
    scores = splits["models"][0]["scores"]
    assert splits["models"][0]["mean"] == pytest.approx(np.mean(list(scores.values())))
    assert splits["models"][0]["deviation"] == pytest.approx(np.std(list(scores.values()), ddof=1))
    assert scores["random:3:0"] == report["rows"][0]["scores"]["mAP@all"]
    assert results["splits"]["ridge"] == splits["models"][0]["mean"]
    page = (tmp_path / "report.html").read_text()
    assert f"{splits['models'][0]['mean']:.3f}" in page


def test_validation_classes_are_tested_only_as_released(tmp_path: Path, made: Set) -> None:
    validation = made.opened[0].config["split"]["validation"]
    assert not set(validation) & set(made.bench().tested)
    report = made.report(tmp_path, "--as-released")
    assert set(validation) < set(report["unseen"])
    assert report["rows"][0]["queries"] == 5 * EACH
    assert any("selected the checkpoints" in note for note in report["notes"])


def test_photos_can_ask_for_sketches(made: Set) -> None:
    there, back = made.measure(Task(query="photo", gallery="sketch")), made.measure(Task())
    assert (there.queries, there.gallery) == (3 * EACH, 3 * EACH)
    assert there.chance == pytest.approx(back.chance)
    assert there.scores["mAP@all"] != back.scores["mAP@all"]
    # a photo and its sketch are a pair in either direction
    assert there.chance["Acc@1"] == pytest.approx(1 / (3 * EACH))


def test_texts_ask_for_photos_and_photos_for_texts(tmp_path: Path, made: Set) -> None:
    """The texts are the sketches under another name, so they score as the sketches do."""
    raw = toy.write_features(tmp_path / "raw", each=EACH)
    (raw / "modality=sketch").rename(raw / "modality=text")
    flags = features_only(tmp_path, raw)
    ok("train", *flags, "--split", "random:3:0", "--query-modality", "text", "--output", tmp_path / "ridge", *RIDGE)
    common = (*flags, "--checkpoint", tmp_path / "ridge", "--output", tmp_path / "report")
    found = {}
    for query, gallery in (("text", "photo"), ("photo", "text")):
        ok("evaluate", *common, "--query-modality", query, "--gallery-modality", gallery)
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        assert report["title"] == f"Zero-shot retrieval: {query} to {gallery}"
        assert [(row["name"], row["kind"]) for row in report["rows"]] == [("ridge", "floor")]
        found[query] = report["rows"][0]["scores"]["mAP@all"]
    assert found["text"] == made.measure(Task()).scores["mAP@all"]
    assert found["photo"] == made.measure(Task(query="photo", gallery="sketch")).scores["mAP@all"]
    results = job("evaluate", *common)
    assert results["exit_code"] == 2
    assert "hold no sketch" in results["error"]


def test_binary_codes_stand_beside_the_embeddings(tmp_path: Path, made: Set) -> None:
    """Codes that were learned on the very queries may beat the embeddings: each side is centred by itself."""
    scores = {}
    for learned_on in ("seen", "queries"):
        report = made.report(tmp_path / learned_on, "--bits", 16, "--bits-learned-on", learned_on)
        coded = report["rows"][1]
        assert (coded["name"], coded["metric"]) == ("ridge, 16 bits", "hamming")
        assert coded["scores"]["mAP@all"] > coded["chance"]["mAP@all"]
        scores[learned_on] = coded["scores"]["mAP@all"]
    assert scores["seen"] != scores["queries"]


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_a_class_that_the_checkpoint_saw_is_refused(made: Set) -> None:
    bench = made.bench()
    unseen = bench.tested[0]
    with pytest.raises(Leakage, match=unseen):
        bench.measure("leaky", open_model(made.opened[0]), saw=(*made.opened[0].facts["saw"], unseen), ks=(10,))
    released = made.bench(Task(as_released=True))
    with pytest.raises(Leakage, match=unseen):
        released.measure("leaky", open_model(made.opened[0]), saw=(*bench.split.validation, unseen), ks=(10,))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--query-modality", "photo"), "both photo"),
        (("--query-modality", "text"), "hold no text"),
        (("--bits", 64), "the largest is 50"),
        (("--splits", 1, "--protocol", "few-shot"), "zero-shot and generalised"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, made: Set, flags: tuple[object, ...], message: str) -> None:
    results = job("evaluate", *made.flags, "--checkpoint", made.checkpoints[0], "--output", tmp_path / "out", *flags)
    assert results["exit_code"] == 2
    assert message in results["error"]
    assert not (tmp_path / "out" / "report.json").exists()


def changed(checkpoint: Artifact, digest: str, **config: Any) -> Artifact:
    """`checkpoint` as if it had another configuration."""
    manifest = {**checkpoint.manifest, "config": {**checkpoint.config, **config}}
    return replace(checkpoint, digest=digest * 64, manifest=manifest)


def test_an_unseen_class_that_the_data_lack_is_refused(made: Set) -> None:
    split = {**made.opened[0].config["split"], "unseen": ["unicorn"]}
    bench = made.bench(checkpoints=(changed(made.opened[0], "a", split=split),))
    with pytest.raises(ConfigError, match="unicorn"):
        bench.measure("ridge", open_model(made.opened[0]), (), (10,))


# ---- names and draws -------------------------------------------------------------------------------------------------


def test_checkpoints_are_grouped_by_what_differs(made: Set) -> None:
    first = made.opened[0]
    settings = first.config["settings"]
    seeded = changed(first, "f", settings={**settings, "seed": 7})
    other = changed(first, "e", settings={**settings, "epochs": 77})
    assert [(name, len(group)) for name, group in named((first, seeded)).items()] == [("ridge", 2)]
    assert set(named((first, other))) == {"ridge (epochs 30)", "ridge (epochs 77)"}
    with pytest.raises(ConfigError, match="one seed"):
        named((first, first))


def test_checkpoints_are_told_apart_by_split(made: Set) -> None:
    about = {name: getattr(made.bench(), name) for name in ("data", "features", "semantics")}
    benches = by_split(about, (*made.opened, made.opened[0]))
    assert [len(bench.checkpoints) for bench in benches] == [2, 1]
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        by_split(about, ())


def test_a_draw_of_seen_items_depends_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(50)
    labels = ids.astype(str)
    pool = Pool(ids, ids, labels, labels, ids[:, None].astype(np.float32))
    first = draw(pool, 40, seed=1)
    order = rng.permutation(50)
    assert first.ids.tolist() == draw(pool.take(order), 40, seed=1).ids.tolist()
    assert (len(first.ids), len(set(first.ids.tolist()))) == (8, 8)
    assert first.features[:, 0].tolist() == first.ids.tolist()
