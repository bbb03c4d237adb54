"""Splits into seen and unseen classes: published ones by name, files, seeded random ones, and the leakage check."""

import json
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from zsr.data.published import Spellings, squeezed
from zsr.data.rows import canonical_label
from zsr.errors import ConfigError, Leakage
from zsr.storage import is_file, read_text


@dataclass(frozen=True)
class Split:
    """Unseen, validation and training classes.

    Attributes:
        unseen: test classes; none of their rows is used in training.
        validation: seen classes held out to choose checkpoints and settings; never trained on, never in the test.
        source: origin of the lists.
        training: the training classes; empty until `resolve` has filled it from the data.
        seen: the classes that training and validation are chosen from, if a file lists them; empty for all but unseen.
    """

    unseen: tuple[str, ...]
    validation: tuple[str, ...] = ()
    source: str = ""
    training: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, one, other in (
            ("unseen and validation", self.unseen, self.validation),
            ("unseen and training", self.unseen, self.training),
            ("validation and training", self.validation, self.training),
            ("unseen and seen", self.unseen, self.seen),
        ):
            if both := sorted(set(one) & set(other)):
                raise Leakage(f"split {self.source!r}: {both} are in both {name}; a class must have one role")

    def resolve(self, labels: Iterable[str], validation_classes: int, seed: int) -> "Split":
        """The split with every role filled from the labels of the data.

        Args:
            labels: every class in the data.
            validation_classes: number of seen classes to hold out if the split names none; 0 holds out none, as
                required by the 5/5 splits of data sets with ten classes.
            seed: seed of the choice of validation classes.

        Raises:
            ConfigError: the split names a class that the data lacks, or no class is left to train on.
            Leakage: the data has an unseen class under two spellings, of which one would be trained on.
        """
        present = sorted(set(labels))
        return self._spelt_as(Spellings(present))._resolved(present, validation_classes, seed)

    def _spelt_as(self, spelling: Spellings) -> "Split":
        """The split with class names spelled as in the data, where they differ only in punctuation."""
        unseen, validation, training, seen = (
            tuple(sorted(map(spelling, names))) for names in (self.unseen, self.validation, self.training, self.seen)
        )
        return replace(self, unseen=unseen, validation=validation, training=training, seen=seen)

    def _resolved(self, present: list[str], validation_classes: int, seed: int) -> "Split":
        if missing := sorted(set(self.unseen + self.validation + self.training + self.seen) - set(present)):
            raise ConfigError(
                f"split {self.source!r} names {missing}, which the data lacks; its {len(present)} classes begin with "
                f"{present[:5]}"
            )
        unseen = {squeezed(label): label for label in self.unseen}
        if twins := [f"{unseen[squeezed(n)]}, {n}" for n in present if n not in self.unseen and squeezed(n) in unseen]:
            raise Leakage(
                f"split {self.source!r}: the data spells the same class in two ways ({twins}); prepare it with one"
            )
        seen = self.seen or tuple(label for label in present if label not in self.unseen)
        pool = self.training or seen
        validation = self.validation or draw(pool, min(validation_classes, len(pool)), seed)
        training = tuple(label for label in pool if label not in validation)
        if len(training) < 2:
            raise ConfigError(
                f"split {self.source!r} leaves {len(training)} classes to train on; at least 2 are required. Of its "
                f"{len(pool)} seen ones, --validation-classes may hold out at most {max(0, len(pool) - 2)}; with 0 the "
                "last checkpoint is used"
            )
        return Split(self.unseen, tuple(sorted(validation)), self.source, tuple(sorted(training)))

    def as_json(self) -> dict[str, Any]:
        """The split as JSON, for plans and checkpoints."""
        return {
            "unseen": list(self.unseen),
            "validation": list(self.validation),
            "training": list(self.training),
            "source": self.source,
        }


class _File(BaseModel):
    """Content of a split file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    unseen: list[str]
    validation: list[str] = []
    training: list[str] = []
    seen: list[str] = []
    source: str | None = None


def draw(classes: Collection[str], count: int, seed: int) -> tuple[str, ...]:
    """Sample `count` classes from the sorted names, with a seed.

    Raises:
        ConfigError: there are fewer classes.
    """
    if count > len(classes):
        raise ConfigError(f"{count} classes are requested, but there are only {len(classes)}")
    return tuple(sorted(random.Random(seed).sample(sorted(classes), count)))


def published() -> dict[str, dict[str, Any]]:
    """The published splits by name: {"unseen": [...], "validation": [...], "source": "..."}."""
    text = resources.files("zsr.data").joinpath("splits.json").read_text()
    splits: dict[str, dict[str, Any]] = json.loads(text)
    return splits


def load(name: str) -> Split:
    """Load a published split by name, or a JSON file.

    Raises:
        ConfigError: neither a published name nor a readable file; unknown keys in the file.
        Leakage: a class has two roles.
    """
    if name in published():
        content = json.dumps(published()[name])
    elif is_file(name):
        content = read_text(name, "split")
    else:
        raise ConfigError(f"split {name!r} is neither a file nor one of {sorted(published())} nor random:UNSEEN:SEED")
    try:
        found = _File.model_validate_json(content)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3])
        raise ConfigError(
            f'split {name}: {wrong}; expected {{"unseen": ["NAME", ...]}}, and optionally the lists '
            f"{sorted(_File.model_fields.keys() - {'unseen', 'source'})}"
        ) from error
    return Split(
        unseen=_names(found.unseen),
        validation=_names(found.validation),
        source=Path(name).name if found.source is None else found.source,
        training=_names(found.training),
        seen=_names(found.seen),
    )


def choose(name: str, labels: Iterable[str], validation_classes: int, seed: int) -> Split:
    """The split `name`, resolved by the labels of the data. `random:14:0` samples 14 unseen classes with seed 0."""
    present = sorted(set(labels))
    if name.startswith("random:"):
        try:
            _, count, split_seed = name.split(":")
            split = Split(draw(present, int(count), int(split_seed)), source=name)
        except ValueError as error:
            raise ConfigError(f"split {name!r}: expected random:UNSEEN:SEED, such as random:14:0") from error
    else:
        split = load(name)
    return split.resolve(present, validation_classes, seed)


def _names(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({canonical_label(value) for value in values}))
