"""Live experiment tracking: progress of a run, and optionally TensorBoard, mlflow or wandb.

The driver reads the lines that rank 0 writes (see `metrics`); workers are not involved. If a tracker fails, a warning
is logged and training continues; the same file can be imported into a tracker later.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from zsr import progress
from zsr.artifact import Plan, write_atomically
from zsr.errors import ConfigError
from zsr.storage import files_below
from zsr.training.config import TrackerName
from zsr.training.metrics import NETWORK, WAIT

logger = logging.getLogger("zsr")

Line = Mapping[str, Any]

POLL: Final = 0.5  # seconds between reads of the file


@dataclass(frozen=True)
class Tracking:
    """Settings of tracking. They are not recorded in the checkpoint's manifest.

    Attributes:
        names: trackers in addition to the JSONL file.
        every: steps between lines.
    """

    names: tuple[TrackerName, ...] = ()
    every: int = 10


class Tracker(Protocol):
    """Receives the metrics of a run, in the order of its steps."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        ...

    def close(self) -> None:
        """Called once, after the last metric."""
        ...


class TensorBoard:
    """Event files in FOLDER/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        from tensorboardX import SummaryWriter  # a dependency of Ray Train

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{json.dumps(plan.config, indent=1, sort_keys=True)}\n```")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Mlflow:
    """A run of experiment `zsr` at $MLFLOW_TRACKING_URI, else in FOLDER/mlflow.db. A resumed run continues it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise ConfigError("--track mlflow requires mlflow; install zsr with the extra 'mlflow'") from None
        folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute()}/mlflow.db")
        found = self.client.get_experiment_by_name("zsr")
        experiment = self.client.create_experiment("zsr") if found is None else found.experiment_id
        held = self.client.search_runs([experiment], f"tags.plan = '{plan.digest}'")
        if held:
            self.run = held[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
        else:
            name = f"{plan.config['model']} {plan.digest[:12]}"
            self.run = self.client.create_run(experiment, tags={"plan": plan.digest}, run_name=name).info.run_id
            for option, value in {**plan.config["options"], **plan.config["settings"]}.items():
                self.client.log_param(self.run, option, value)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, [Metric(name, value, now, step) for name, value in scalars.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Wandb:
    """A run of project `zsr` ($WANDB_PROJECT). Its id is from the plan's digest, so that a resumed run continues it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("--track wandb requires wandb; install zsr with the extra 'wandb'") from None
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "zsr"),
            id=plan.digest[:12],
            resume="allow",
            dir=str(folder),
            config=dict(plan.config),
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: Final[Mapping[TrackerName, Callable[[Path, Plan], Tracker]]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}


@contextmanager
def follow(
    path: Path, last_step: int, tracking: Tracking, plan: Plan, done: int = 0, output: Path | None = None
) -> Iterator[None]:
    """Follow the metrics file `path` of a run of `plan` while the body runs, and once more after it.

    Args:
        last_step: the last step of the run, unless it stops early.
        output: the log folder in a bucket, if it is not that of `path`. What trackers have written is uploaded there at
            the end.
        done: steps that an interrupted run finished.

    Raises:
        ConfigError: a tracker is not installed.
    """
    trackers: dict[str, Tracker] = {name: TRACKERS[name](path.parent, plan) for name in tracking.names}
    over = threading.Event()
    watcher = Watcher(path, trackers)
    with progress.stage("train", last_step, "steps", done=done, poll=lambda: watcher.step) as stage:
        watcher.show = partial(_show, stage)
        thread = threading.Thread(target=_watch, args=(watcher, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            watcher.look()
            stage.look()
            watcher.close()
            if output not in (None, path.parent):
                _put(path, output)


def _put(path: Path, output: Path) -> None:
    """Upload the files next to the metrics file `path` to a bucket; rank 0 has already uploaded `path` itself."""
    for file in files_below(path.parent):
        if file != path:
            write_atomically(output / file.relative_to(path.parent), file.read_bytes())


def _show(stage: progress.Stage, latest: Line) -> None:
    """Show the latest metrics; on a terminal, print a line per epoch."""
    stage.note = sentence(latest)
    if latest["kind"] == "epoch" and stage.terminal:
        progress.say(f"train: step {latest['step']}, {stage.note}")


def _watch(watcher: "Watcher", over: threading.Event) -> None:
    while not over.wait(POLL):
        watcher.look()


class Watcher:
    """Reads the lines that were added since the last read. It skips lines from before its start, by another driver.

    Attributes:
        latest: the latest value of every metric.
        step: the latest step.
        show: called with `latest`, to display it.
    """

    def __init__(self, path: Path, trackers: dict[str, Tracker]) -> None:
        self.path, self.trackers = path, trackers
        self.show: Callable[[Line], object] = lambda _: None
        self.latest: dict[str, Any] = {}
        self.step = 0
        self.offset, self.inode = 0, 0
        self.done: dict[str, int] = {}  # the last step by kind of line
        for line in self._lines():
            self.done[line["kind"]] = line["step"]

    def look(self) -> None:
        """Read new lines and pass them to the trackers and the display."""
        for line in self._lines():
            kind, step = str(line["kind"]), int(line["step"])
            if step <= self.done.get(kind, 0):
                continue  # logged again after a lost worker
            self.done[kind] = step
            self.latest.update(line)
            self.step = step
            self._track(kind, step, line)
            self.show(self.latest)

    def close(self) -> None:
        """Close the trackers."""
        for name, tracker in self.trackers.items():
            with _forgiven(name):
                tracker.close()

    def _track(self, kind: str, step: int, line: Line) -> None:
        scalars = {
            name if kind == "step" or name == "validation_map_all" else f"epoch/{name}": float(value)
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name, tracker in list(self.trackers.items()):
            with _forgiven(name, partial(self.trackers.pop, name)):
                tracker.write(step, scalars)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Complete lines that were not read yet; from the start again if a restarted run has rewritten the file."""
        try:
            with self.path.open("rb") as handle:
                inode = os.fstat(handle.fileno()).st_ino
                self.offset = handle.seek(self.offset if inode == self.inode else 0)
                data = handle.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self.inode, self.offset = inode, self.offset + len(whole)
        yield from map(json.loads, whole.splitlines())


@contextmanager
def _forgiven(name: str, otherwise: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Log the errors of a tracker instead of raising them, and call `otherwise`: a tracker must not stop training."""
    try:
        yield
    except Exception as error:
        logger.warning("tracker %s failed and is disabled: %s: %s", name, type(error).__name__, error)
        otherwise()


def sentence(latest: Line) -> str:
    """Summarize the latest metrics for display: loss, validation score, throughput and bottleneck."""
    losses = [value for name, value in latest.items() if name.startswith("loss/") and value is not None]
    said = [f"loss {sum(losses):.4g}"] if losses else []
    if latest.get("validation_map_all") is not None:
        said.append(f"validation mAP {latest['validation_map_all']:.4f}")
    said.append(f"{latest['samples_a_second']:.0f} samples/s")
    if "bottleneck" in latest:
        data, network = latest[WAIT], latest[NETWORK]
        shares = f"data {data:.0%}, network {network:.0%}, compute {1 - data - network:.0%}"
        said.append(f"bottleneck {latest['bottleneck']} ({shares})")
    return ", ".join(said)
