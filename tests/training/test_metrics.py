"""What a run says of itself: a line each few steps and each epoch, each told once to whoever watches."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from tests import toy
from tests.pipeline import features_only, ok
from zsr.artifact import Plan
from zsr.models import MODELS, build
from zsr.models.protocol import Inputs, Model, Optimizer
from zsr.training.memory import memory, state_bytes
from zsr.training.metrics import Meter, bottleneck
from zsr.training.trackers import Tracking, Watcher, follow, sentence

STEP = {"kind": "step", "step": 2, "samples_a_second": 9.0, "data_wait_share": 0.5, "loss/all/a": 1.0}
EPOCH = {"kind": "epoch", "step": 2, "validation_map_all": 0.25, "samples_a_second": 8.0, "data_wait_share": 0.5,
         "network_share": 0.1, "bottleneck": "data", "loss/all/a": 2.0}  # fmt: skip
PLAN = Plan("checkpoint", {"model": "ridge", "options": {"a": 1}, "settings": {"seed": 0}})


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every scalar of TensorBoard's event files, by name and step."""
    found = {}
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)  # then a checksum, the event, and its checksum
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found.update(
                {(v.tag, event.step): v.simple_value for v in event.summary.value if v.HasField("simple_value")}
            )
            at += 16 + size
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_says_what_its_steps_cost_and_what_holds_them_up(tmp_path: Path) -> None:
    inputs = features_only(tmp_path, toy.write_features(tmp_path / "raw"))
    short = ("--split", "random:3:0", "--validation-classes", 2, "--epochs", 2, "--steps-per-epoch", 5)
    watched = ("--batch-size", 16, "--log-every", 2, "--track", "tensorboard", "--num-workers", 2)
    ok("train", *inputs, *short, *watched, "--model", "cvae", "--output", tmp_path / "out")
    (path,) = (tmp_path / "out" / "logs").rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("step", 2), ("step", 4), ("epoch", 5), ("step", 6), ("step", 8), ("step", 10), ("epoch", 10))
    ]
    made = build("cvae", {}, Inputs(sketch_dim=4, photo_dim=4, semantic_dim=0, classes=("a",)))
    (group,) = cast(Model, made).groups.items()
    for line in lines:
        assert line["samples_a_second"] > 0
        assert 0 <= line["data_wait_share"] <= 1
        assert any(name.startswith("loss/") for name in line)
        if line["kind"] == "step":
            assert line[f"norm/{group[0]}"] > 0
            assert line[f"rate/{group[0]}"] == group[1].optimizer.lr
            assert line["memory_bytes"] > 50_000_000  # torch alone has more
        else:
            assert 0 < line["network_share"] <= 1  # two workers
            assert line["bottleneck"] in ("data", "network", "compute")
            assert 0 <= line["validation_map_all"] <= 1
    shown = scalars(path.parent / "tensorboard")
    assert shown["validation_map_all", 10] == pytest.approx(lines[-1]["validation_map_all"])
    assert shown[f"norm/{group[0]}", 6] == pytest.approx(lines[3][f"norm/{group[0]}"])
    assert {step for name, step in shown if name == "samples_a_second"} == {2, 4, 6, 8, 10}


def test_a_gradients_norm_is_taken_in_the_steps_that_are_logged() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    meter = Meter(None, every=10, rows=1)
    optimizer.register_step_pre_hook(meter._hook("all"))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert meter._norms == {}
    meter._due = True
    optimizer.step()
    assert meter._norms["all"] == 5.0


def test_a_restarted_run_drops_what_it_will_log_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 11}\n{"step": 1')

    class Engines:
        engines: Mapping[str, Any] = {}

    Meter(path, every=1, rows=1).begin(Engines(), 10)  # type: ignore[arg-type]
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'


class Told:
    """A tracker that remembers, and one that fails at step `bad`."""

    def __init__(self, bad: int = 0) -> None:
        self.said: list[tuple[int, dict[str, float]]] = []
        self.bad = bad

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if step == self.bad:
            raise OSError("no route")
        self.said.append((step, dict(scalars)))

    def close(self) -> None:
        self.said.append((-1, {}))


def test_a_watcher_tells_every_line_once_and_none_of_another_driver(tmp_path: Path) -> None:
    path, told, failing = tmp_path / "metrics.jsonl", Told(), Told(bad=3)
    lines = [json.dumps({**STEP, "step": step}) + "\n" for step in (1, 2, 3, 4)]
    path.write_text(lines[0])
    watcher = Watcher(path, {"told": told, "failing": failing})
    with path.open("a") as handle:
        handle.write(lines[1] + lines[2][:9])
    watcher.look()
    assert [step for step, _ in told.said] == [2]
    (tmp_path / "new").write_text("".join(lines[:3]))  # a lost worker: cut back, and logged again
    os.replace(tmp_path / "new", path)
    watcher.look()
    with path.open("a") as handle:
        handle.write(lines[3])
    watcher.look()
    watcher.close()
    assert [step for step, _ in told.said] == [2, 3, 4, -1]
    assert [step for step, _ in failing.said] == [2]  # left after its error, and training goes on
    assert told.said[0][1] == {"samples_a_second": 9.0, "data_wait_share": 0.5, "loss/all/a": 1.0}


def test_a_person_reads_where_it_stands_and_what_holds_it_up() -> None:
    assert sentence(STEP) == "loss 1, 9 samples/s"
    assert sentence({**STEP, **EPOCH}) == (
        "loss 2, validation mAP 0.2500, 8 samples/s, bottleneck data (data 50%, network 10%, compute 40%)"
    )
    assert [bottleneck(0.5, 0.1), bottleneck(0.1, 0.5), bottleneck(0.3, 0.3)] == ["data", "network", "compute"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow uses what sqlalchemy is about to drop
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_other_trackers_take_the_same_numbers(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name, reason=f"the extra {name!r} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = tmp_path / "metrics.jsonl"
    with follow(path, 2, Tracking((name,)), PLAN):
        path.write_text(json.dumps(STEP) + "\n" + json.dumps(EPOCH) + "\n")
    if name == "wandb":
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        return
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("zsr").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["validation_map_all"] == 0.25
    assert (run.data.metrics["loss/all/a"], run.data.metrics["epoch/loss/all/a"]) == (1.0, 2.0)
    assert run.data.params == {"a": "1", "seed": "0"}


def test_memory_by_the_formula_of_each_stage() -> None:
    inputs = Inputs(sketch_dim=10, photo_dim=20, semantic_dim=0, classes=("a",))
    with torch.device("meta"):
        model = build("contrastive", {"dim": 5}, inputs)
    trained = sum(p.numel() for p in model.parameters())
    frozen = 2 * (10 + 20)  # mean and deviation of the scales
    found = memory(model, 3, 4)
    assert found["zero_0"] == 4 * frozen + 16 * trained  # Adam
    assert found["zero_1"] == 4 * frozen + 8 * trained + 12 * trained // 4
    assert found["zero_2"] == 4 * frozen + 4 * trained + 16 * trained // 4
    assert found["zero_3"] == 4 * frozen + 16 * trained // 4
    assert found["activations"] > 0
    assert memory(model, 6, 4)["activations"] == 2 * found["activations"]


def test_optimizer_states_a_parameter() -> None:
    kinds = [Optimizer("adam", 1.0), Optimizer("adamw", 1.0, amsgrad=True), Optimizer("sgd", 1.0)]
    assert [state_bytes(kind) for kind in (*kinds, Optimizer("sgd", 1.0, momentum=0.9))] == [8, 12, 0, 4]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_an_estimate(name: str) -> None:
    with torch.device("meta"):
        model = build(name, {}, Inputs(sketch_dim=12, photo_dim=12, semantic_dim=6, classes=("a", "b", "c")))
    assert memory(model, 8, 2)["zero_0"] > 0
