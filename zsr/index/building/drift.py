"""Whether new vectors still look like those that an index was trained on."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from zsr.artifact import Json, canonical
from zsr.index import faiss_backend

FOUND: Final = "trained_on.json"
MORE_ERROR: Final = 1.2  # times the sample's quantisation error from which on a retrain is due
LESS_BALANCE: Final = 2.0  # times the sample's imbalance
FEWEST: Final = 1000  # vectors below which balance says nothing


@dataclass(frozen=True, slots=True)
class Spread:
    """How some vectors lie among the lists of a template.

    Attributes:
        rows: vectors looked at.
        error: mean square distance from a vector to the centroid of its list, over the mean square length of vectors,
            both after the transform.
        imbalance: see `imbalance`.
    """

    rows: int
    error: float
    imbalance: float

    @classmethod
    def of(cls, template: Any, vectors: np.ndarray) -> "Spread":
        """Of `vectors` (n, D) float32 under a trained index."""
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
    """nlist times the chance that two vectors share a list, of list sizes (nlist,): 1 if all are equal."""
    share = sizes / max(1, sizes.sum())
    return round(float(len(sizes) * np.square(share).sum()), 6)


def report(trained_on: Json, new: Spread, sizes: np.ndarray) -> dict[str, Any]:
    """The training sample beside the new vectors and the whole index, and whether a retrain is due, and why.

    New vectors are to lie as near to their centroids as the sample did. The lists are to stay as even as the sample
    filled them, and of those the whole index counts: a shard that was written class by class fills few lists, and
    slows no search down. n vectors put at random into L lists have an imbalance of about 1 + L / n, which is taken off
    first.

    Args:
        new: of the new vectors.
        sizes: (nlist,) vectors in each list of the whole index after the change, deleted ones with them.
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
