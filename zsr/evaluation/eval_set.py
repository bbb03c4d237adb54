"""Evaluation set: the queries and gallery of a protocol, the same for every model of a report.

    zero-shot             unseen queries, gallery of unseen items
    generalised           unseen queries, gallery of all classes (Yelamarthi et al.); seen queries are scored separately
    generalised-sempcyc   queries and gallery also hold a fifth as many seen as unseen items (SEM-PCYC's released code)
    few-shot              as zero-shot, but models are trained on a few items of each unseen class, which are left out

In both generalised settings the seen items are training items: there is no held-out set of the seen classes.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch

from zsr import metrics, progress
from zsr.artifact import Artifact
from zsr.data.shards import Source, collect
from zsr.data.splits import Split
from zsr.devices import AUTO, DeviceSettings
from zsr.embedding.encode import vectors_of
from zsr.embedding.gallery import source_of
from zsr.errors import ConfigError, Leakage
from zsr.evaluation import imagenet, protocol
from zsr.evaluation.protocol import Evaluation, Sampling, Side
from zsr.evaluation.settings import BackboneSaw, Protocol
from zsr.metrics import Ints, Labels
from zsr.models import backbones
from zsr.models.protocol import Embedder, Inputs
from zsr.preprocessing import pictures_of

SEEN_SHARE: Final = 0.2  # seen items per unseen item, in SEM-PCYC's released code


@dataclass(frozen=True)
class Task:
    """The retrieval task and protocol to evaluate.

    Attributes:
        query, gallery: modalities.
        protocol: see the module docstring.
        as_released: include the validation classes, which selected the checkpoint, in the test, as SEM-PCYC's released
            code does.
        shots: training items per unseen class and modality of a few-shot model.
        backbone_saw: training classes of the backbone; auto infers them from its name.
        seed: of the samples of seen items and of shots.
    """

    query: str = "sketch"
    gallery: str = "photo"
    protocol: Protocol = "zero-shot"
    as_released: bool = False
    shots: int = 5
    backbone_saw: BackboneSaw = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Pool:
    """Rows of one modality before they are embedded.

    Attributes:
        ids, pairs: (N,) int64. labels, keys: (N,) strings. features: (N, D), or images (N, H, W, 3).
    """

    ids: Ints
    pairs: Ints
    labels: Labels
    keys: Labels
    features: np.ndarray

    def take(self, rows: np.ndarray) -> "Pool":
        """Select rows by a mask or by row numbers."""
        return Pool(self.ids[rows], self.pairs[rows], self.labels[rows], self.keys[rows], self.features[rows])

    def of(self, classes: Iterable[str]) -> "Pool":
        """The rows of some classes."""
        return self.take(np.isin(self.labels, sorted(classes)))


@dataclass(frozen=True)
class Asked:
    """Rows of a protocol: unseen queries, seen queries (in generalised settings only) and the gallery."""

    query: Pool
    seen: Pool | None
    gallery: Pool


@dataclass(frozen=True)
class Bench:
    """Data, and checkpoints of one split.

    Attributes:
        features: of that data; None if every checkpoint has an image tower.
        semantics: for the ridge baseline; None leaves it out.
        support: ids of the unseen training items in the few-shot setting.
        devices: for evaluation and retraining.
    """

    data: Artifact
    features: Artifact | None
    semantics: Artifact | None
    checkpoints: tuple[Artifact, ...]
    task: Task = Task()
    support: tuple[int, ...] = ()
    devices: DeviceSettings = AUTO
    _held: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("nothing to evaluate; give at least one --checkpoint")
        if self.task.query == self.task.gallery:
            raise ConfigError(f"queries and gallery are both {self.task.query}; they must be of two modalities")
        for checkpoint in self.checkpoints:
            towers = Inputs.model_validate(checkpoint.config["inputs"]).tower is not None
            for modality in (self.task.query, self.task.gallery):
                source_of(self.data, None if towers else self.features, checkpoint, modality)
        if len({tuple(c.config["split"]["unseen"]) for c in self.checkpoints}) > 1:
            raise ConfigError("the checkpoints of one evaluation set were trained for different splits")
        self._refuse_leaks()

    def _refuse_leaks(self) -> None:
        """Raise Leakage if a backbone was fine-tuned on an unseen class, or anything was trained on a tested class.

        With `as_released`, validation classes that only selected a checkpoint may be tested; after retraining on all
        seen classes (--refit) they may not, since they are then training classes.
        """
        tuned = {} if self.features is None else self.features.config
        trained = {name for c in self.checkpoints for name in c.facts["trained"]} | set(tuned.get("trained", ()))
        leaked = set(tuned.get("saw", ())) & set(self.split.unseen)
        if self.task.as_released:
            leaked |= trained & set(self.tested)
        if leaked:
            raise Leakage(
                f"{sorted(leaked)[:5]} are test classes, but a checkpoint (after --refit) or the features' backbone "
                "was trained on them; use checkpoints and features that were not"
            )

    @cached_property
    def split(self) -> Split:
        """The split recorded in the checkpoints."""
        found = self.checkpoints[0].config["split"]
        roles = {role: tuple(found[role]) for role in ("unseen", "validation", "training")}
        return Split(source=str(found["source"]), **roles)

    @property
    def tested(self) -> tuple[str, ...]:
        """The classes that count as unseen."""
        return tuple(sorted(self.split.unseen + (self.split.validation if self.task.as_released else ())))

    @property
    def device(self) -> str | None:
        """Device for models and ranking: this machine's GPU, unless CPUs are requested; None is the CPU."""
        return "cuda" if torch.cuda.is_available() and self.devices.device != "cpu" else None

    @property
    def query_kind(self) -> str:
        """The models' query modality, sketch or text; with `--query-modality photo` it is the gallery here."""
        return self.task.gallery if self.task.query == "photo" else self.task.query

    # ---- rows ----

    def pool(self, source: Source, modality: str, classes: tuple[str, ...]) -> Pool:
        """Every row of `classes`; cached."""
        key = (source.digest if isinstance(source, Artifact) else source, modality, classes)
        if key not in self._held:
            with self._slow(f"read {modality}", self._count(modality, classes), not isinstance(source, Artifact)):
                rows = collect(self.data, source, modality, classes)
            labels = np.array(classes)[rows.labels]
            self._held[key] = Pool(rows.ids, rows.pairs, labels, np.array(rows.keys), rows.features)
        found: Pool = self._held[key]
        return found

    def _count(self, modality: str, classes: tuple[str, ...]) -> int:
        """Number of rows of `classes` in DATA."""
        return sum(int(e.facts["classes"].get(name, 0)) for e in self.data.shards(modality) for name in classes)

    @staticmethod
    def _slow(what: str, rows: int, pictures: bool) -> AbstractContextManager[object]:
        """A progress stage for images only; features are fast, and must not count in an enclosing stage."""
        return progress.stage(what, rows) if pictures else progress.counting(progress.ignore)

    def asked(self, source: Source) -> Asked:
        """The rows of the protocol."""
        key = ("asked", source.digest if isinstance(source, Artifact) else source)
        if key not in self._held:
            self._held[key] = self._ask(source)
        found: Asked = self._held[key]
        return found

    def _ask(self, source: Source) -> Asked:
        task, seen = self.task, tuple(sorted(set(self.split.training + self.split.validation) - set(self.tested)))
        query, gallery = (self.pool(source, modality, self.tested) for modality in (task.query, task.gallery))
        if task.protocol == "zero-shot":
            return Asked(query, None, gallery)
        if task.protocol == "few-shot":
            kept = [pool.take(~np.isin(pool.ids, self.support)) for pool in (query, gallery)]
            return Asked(kept[0], None, kept[1])
        more, others = (self.pool(source, modality, seen) for modality in (task.query, task.gallery))
        if task.protocol == "generalised-sempcyc":
            more, others = draw(more, len(query.ids), task.seed), draw(others, len(gallery.ids), task.seed)
        return Asked(query, more, _joined(gallery, others))

    # ---- models ----

    def source(self, model: Embedder) -> Source:
        """The input of a model: FEATURES, or images if it has an image tower."""
        tower = model.inputs.tower
        if tower is not None:
            return pictures_of(tower)
        if self.features is None:
            raise ConfigError("a model to evaluate requires features; give --features")
        return self.features

    def embed(self, model: Embedder, modality: str, pool: Pool) -> Side:
        """Embed rows with `model`; the vectors of a multi-vector item are consecutive rows. Used for all embedding."""
        with self._slow(f"embed {modality}", len(pool.ids), pool.features.ndim > 2):
            embedded = vectors_of(model, modality, pool.features, self.device or "cpu")
        count, parts, dim = embedded.shape
        rows = np.repeat(np.arange(count), parts)
        part = np.tile(np.arange(parts, dtype=np.int16), count) if parts > 1 else None
        flat = embedded.reshape(-1, dim)
        return Side(pool.ids[rows], pool.keys[rows], pool.labels[rows], flat, part, pairs=pool.pairs[rows])

    def sides(self, model: Embedder) -> tuple[Side, Side]:
        """Unseen queries and gallery, embedded."""
        model = model.to(self.device or "cpu")
        asked = self.asked(self.source(model))
        return self.embed(model, self.task.query, asked.query), self.embed(model, self.task.gallery, asked.gallery)

    def guard(self, query: Side, gallery: Side, saw: Iterable[str]) -> None:
        """Raise if the protocol is violated: see `protocol.zero_shot` and `protocol.few_shot`.

        Args:
            saw: classes that the checkpoint was trained on or selected by.
        """
        if self.task.protocol == "few-shot":
            protocol.few_shot(query, gallery, unseen=self.tested, support=np.array(self.support, dtype=np.int64))
            return
        chosen_by = self.split.validation if self.task.as_released else ()
        generalised = self.task.protocol != "zero-shot"
        trained = set(saw) - set(chosen_by)
        protocol.zero_shot(query, gallery, unseen=self.tested, trained=trained, generalised=generalised)

    def measure(self, name: str, model: Embedder, saw: Iterable[str], ks: Sequence[int]) -> Evaluation:
        """Evaluate one model by exact search. Raises Leakage if the protocol forbids its training classes."""
        query, gallery = self.sides(model)
        self.guard(query, gallery, saw)
        options: dict[str, Any] = {"metric": model.metric, "ks": ks, "sampling": self.sampling, "device": self.device}
        asked = self.asked(self.source(model))
        if asked.seen is None:
            with progress.stage(f"evaluate {name}", len(asked.query.ids), "queries"):
                return protocol.evaluate(name, query, gallery, **options)
        seen = self.embed(model, self.task.query, asked.seen)
        with progress.stage(f"evaluate {name}", len(asked.query.ids) + len(asked.seen.ids), "queries"):
            return protocol.evaluate_generalised(name, query, seen, gallery, **options)

    def map_all(self, model: Embedder) -> float:
        """mAP@all only, which is cheaper, for the many checkpoints of one run."""
        query, gallery = self.sides(model)
        items, q = query.merged()
        others, g = gallery.merged()
        return metrics.mean_average_precision(q, g, items.labels, others.labels, model.metric, device=self.device)

    # ---- training classes of the backbone ----

    @property
    def backbone(self) -> str:
        """Name of the first checkpoint's backbone; "imported" if features were not computed here."""
        tower = Inputs.model_validate(self.checkpoints[0].config["inputs"]).tower
        if tower is not None:
            return str(tower.architecture["name"]) if tower.weights else "random weights"
        return str(self.features.config.get("backbone", "imported")) if self.features else "imported"

    @cached_property
    def matches(self) -> dict[str, tuple[str, ...]] | None:
        """For each test class the backbone's training classes that equal it or are below it; None if unknown."""
        saw = self.task.backbone_saw
        if saw == "auto" and self.backbone == "random weights":
            return dict.fromkeys(self.tested, ())
        on_imagenet = saw == "imagenet-1k" or (saw == "auto" and backbones.on_imagenet(self.backbone))
        return imagenet.known(self.tested) if on_imagenet else None

    @property
    def sampling(self) -> Sampling:
        """Sampling settings, with the test classes that the backbone was not trained on."""
        found = self.matches
        new = None if found is None else tuple(label for label, known in found.items() if not known)
        return replace(protocol.DEFAULT, disjoint=new)


def draw(pool: Pool, unseen: int, seed: int) -> Pool:
    """Sample SEEN_SHARE * `unseen` rows without replacement; all rows if there are fewer."""
    count = min(len(pool.ids), round(SEEN_SHARE * unseen))
    rows = np.random.default_rng(seed).permutation(len(pool.ids))[:count]
    return pool.take(np.argsort(pool.ids)[rows])


def _joined(one: Pool, other: Pool) -> Pool:
    names = ("ids", "pairs", "labels", "keys", "features")
    return Pool(**{name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in names})
