"""Drift: whether new vectors still match the distribution that an index was trained on."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from zsr.artifact import Json, canonical
from zsr.index import faiss_backend

FOUND: Final = "trained_on.json"
MORE_ERROR: Final = 1.2  # a retrain is due above this multiple of the training sample's quantization error
LESS_BALANCE: Final = 2.0  # a retrain is due above this multiple of the training sample's imbalance
FEWEST: Final = 1000  # min vectors for a meaningful imbalance


@dataclass(frozen=True, slots=True)
class Spread:
    """Distribution of some vectors over the lists of a template.

    Attributes:
        rows: number of vectors.
        error: mean squared distance from a vector to the centroid of its list, over the mean squared length of the
            vectors, both after the transform.
        imbalance: see `imbalance`.
    """

    rows: int
    error: float
    imbalance: float

    @classmethod
    def of(cls, template: Any, vectors: np.ndarray) -> "Spread":
        """Measure `vectors` (n, D) float32 under a trained index."""
        with faiss_backend.threads(1):
            sizes, error = faiss_backend.assigned(template, vectors)
        return cls(len(vectors), round(error, 6), imbalance(sizes))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Spread":
        return cls(**json.loads(data))

    def to_bytes(self) -> bytes:
        return canonical(self.as_json())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def imbalance(sizes: np.ndarray) -> float:
    """nlist times the probability that two vectors share a list, for list sizes (nlist,): 1 if all are equal."""
    share = sizes / max(1, sizes.sum())
    return round(float(len(sizes) * np.square(share).sum()), 6)


def report(trained_on: Json, new: Spread, sizes: np.ndarray) -> dict[str, Any]:
    """Compare the training sample with the new vectors and the whole index: whether a retrain is due, and why.

    Two criteria: the quantization error of the new vectors, and the imbalance of the lists. The imbalance is that of
    the whole index, since a shard written class by class fills few lists without slowing search down. n vectors put at
    random into L lists have an imbalance of about 1 + L / n; L / n is subtracted first.

    Args:
        new: of the new vectors.
        sizes: (nlist,) vectors in each list of the whole index after the change, deleted ones included.
    """
    old, whole = Spread(**trained_on), {"rows": int(sizes.sum()), "imbalance": imbalance(sizes)}
    why = []
    if new.error > MORE_ERROR * old.error:
        why.append(f"quantisation error {new.error:.3f} against {old.error:.3f} of the training sample")
    before = old.imbalance - len(sizes) / old.rows
    now = whole["imbalance"] - len(sizes) / max(1, whole["rows"])
    if whole["rows"] >= FEWEST and now > LESS_BALANCE * before:
        why.append(f"imbalance {now:.2f} against {before:.2f} of the training sample, chance taken off")
    return {
        "trained_on": old.as_json(),
        "new": new.as_json(),
        "index": whole,
        "retrain": bool(why),
        "why": why,
    }
