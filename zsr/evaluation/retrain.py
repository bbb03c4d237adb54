"""Models that an evaluation trains itself: the ridge baseline, few-shot models, and models on other class splits.

They are trained by `train_model` with the configuration in the checkpoint; finished models are reused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zsr import progress
from zsr.artifact import Artifact, Plan, Staging, Store
from zsr.data import splits
from zsr.data.features import seal_features
from zsr.data.splits import Split
from zsr.errors import ConfigError
from zsr.evaluation.eval_set import Bench
from zsr.executor import VECTORS, map_pieces
from zsr.models.protocol import Inputs
from zsr.training.config import TrainSettings
from zsr.training.run import Run, train_model

PENALTY: Final = 1000.0  # of ridge regression without validation classes: the middle of its grid


def ridge_floor(bench: Bench, store: Store, shots: "Shots | None" = None) -> Artifact:
    """The ridge checkpoint of the evaluation set's split, solved now unless it is in `store` already.

    If all checkpoints were retrained on all seen classes (--refit), so is the baseline: it then saw the same classes.
    Without validation classes its penalty is `PENALTY`.

    Args:
        shots: training data of few-shot models.
    """
    refit = all("chosen" in checkpoint.parents for checkpoint in bench.checkpoints)
    options = {} if bench.split.validation else {"penalties": [PENALTY]}
    settings = TrainSettings(num_workers=1, refit=refit)
    return train_model(_run(bench, "ridge", options, settings, store, bench.split, shots))


def again(
    bench: Bench, checkpoint: Artifact, store: Store, split: Split | None = None, shots: "Shots | None" = None
) -> Artifact:
    """Train a model with the configuration of `checkpoint`, for another split or with a few unseen items.

    Raises:
        ConfigError: it has an image tower, whose initial weights a checkpoint does not hold.
    """
    config = checkpoint.config
    if Inputs.model_validate(config["inputs"]).tower is not None:
        raise ConfigError(
            f"{config['model']} has an image tower and cannot be retrained from its checkpoint; train it with "
            "zsr train for each split, and give all checkpoints"
        )
    settings = TrainSettings.model_validate(config["settings"])
    run = _run(bench, str(config["model"]), config["options"], settings, store, split or bench.split, shots)
    return train_model(replace(run, deepspeed=dict(config["deepspeed"])))


def _run(
    bench: Bench,
    model: str,
    options: Mapping[str, Any],
    settings: TrainSettings,
    store: Store,
    split: Split,
    shots: "Shots | None",
) -> Run:
    if bench.features is None:
        raise ConfigError(f"{model} requires features for training; give --features")
    return Run(
        data=bench.data,
        features=bench.features if shots is None else shots.features,
        semantics=bench.semantics,
        split=split if shots is None else shots.split,
        model=model,
        options=dict(options),
        settings=settings,
        output=store,
        query="text" if bench.query_kind == "text" else "sketch",
        device=bench.devices,
    )


def random_split(bench: Bench, number: int) -> Split:
    """Random split of the data's classes with seed `number`, with the class counts of the evaluation set's split."""
    labels = bench.data.facts["classes"]
    unseen = splits.draw(labels, len(bench.split.unseen), number)
    name = f"random:{len(unseen)}:{number}"
    return Split(unseen, source=name).resolve(labels, len(bench.split.validation), number)


# ---- few-shot --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shots:
    """Training data of few-shot models.

    Attributes:
        support: ids of unseen items, `task.shots` per class and modality.
        features: FEATURES without the other items of these classes.
        split: with the unseen classes among the training classes.
    """

    support: tuple[int, ...]
    features: Artifact
    split: Split


def few_shot(bench: Bench, store: Store) -> Shots:
    """Sample a few items of each unseen class for training.

    Models are retrained with them. This is believed to be the setup of Dutta and Akata (IJCV 2020); how the items are
    sampled was chosen in this project.

    Raises:
        ConfigError: no features, or a class with too few items.
    """
    if bench.features is None:
        raise ConfigError("few-shot models are retrained on features; give --features")
    support = support_of(bench, bench.features)
    features = _only(bench.features, bench.data, bench.tested, support, Store.at(store.place / "features"))
    training = tuple(sorted(set(bench.split.training) | set(bench.tested)))
    validation = tuple(sorted(set(bench.split.validation) - set(bench.tested)))
    return Shots(support, features, Split((), validation, bench.split.source, training))


def support_of(bench: Bench, features: Artifact) -> tuple[int, ...]:
    """Sample the ids of the training items: `shots` per test class, in both queries and gallery.

    Raises:
        ConfigError: a class has no item left to evaluate.
    """
    rng = np.random.default_rng(bench.task.seed)
    found: list[int] = []
    for modality in (bench.task.query, bench.task.gallery):
        pool = bench.pool(features, modality, bench.tested)
        for label in bench.tested:
            ids = np.sort(pool.ids[pool.labels == label])
            if len(ids) <= bench.task.shots:
                raise ConfigError(
                    f"--shots {bench.task.shots}: class {label!r} has {len(ids)} {modality} items; at least "
                    f"{bench.task.shots + 1} are needed, to leave one to evaluate"
                )
            found += rng.choice(ids, bench.task.shots, replace=False).tolist()
    return tuple(sorted(found))


def _only(
    features: Artifact, data: Artifact, classes: tuple[str, ...], support: tuple[int, ...], store: Store
) -> Artifact:
    """FEATURES without the rows of `classes` that are not in `support`; training skips rows without features."""
    config = {**features.config, "unseen_items_trained_on": list(support)}
    plan = Plan("features", config, {"data": data.digest, "features": features.digest})
    if done := store.made(plan):
        return done
    staging = store.staging(plan)
    names = [entry.path for entry in data.shards() if entry.path in {f.path for f in features.files}]
    todo = [{"name": name} for name in names if staging.finished(name) is None]
    shared = {"features": features, "data": data, "classes": classes, "support": support, "staging": staging}
    sizes = [int(features.entry(piece["name"]).facts["rows"]) for piece in todo]
    map_pieces("few-shot features", _shard, todo, small=sum(sizes) <= VECTORS, rows=sizes, fn_kwargs=shared)
    return seal_features(staging, store, names, {"backbone": str(features.config.get("backbone"))})


def _shard(
    piece: dict[str, Any],
    features: Artifact,
    data: Artifact,
    classes: tuple[str, ...],
    support: tuple[int, ...],
    staging: Staging,
) -> dict[str, Any]:
    """Stage one shard. Runs in a Ray task."""
    name = piece["name"]
    rows = data.read_table(name, columns=["id", "label"])
    hidden = pc.and_(
        pc.is_in(rows.column("label"), value_set=pa.array(classes, pa.string())),
        pc.invert(pc.is_in(rows.column("id"), value_set=pa.array(support, pa.int64()))),
    )
    table = features.read_table(name)
    ids = rows.filter(hidden).column("id").combine_chunks()
    kept = table.filter(pc.invert(pc.is_in(table.column("id"), value_set=ids)))
    facts = {"rows": len(kept), "quarantined": 0, "dim": table.column("feature").type.list_size if len(kept) else 0}
    staging.write_table(name, kept, facts=facts)
    progress.advance(len(table))
    return {"name": name, "rows": len(kept)}
