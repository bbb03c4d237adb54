"""Formulas written once more in numpy, float64 and loops where that is plainer, for tests to compare ours with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def itq_rotation(values: Array, start: Array, rounds: int) -> Array:
    """R after `rounds` of B = sign(V R), SVD of B'V = U S W', R = W U'."""
    turn = start
    for _ in range(rounds):
        corner = np.where(values @ turn > 0, 1.0, -1.0)
        u, _, w_transposed = np.linalg.svd(corner.T @ values)
        turn = w_transposed.T @ u.T
    return turn


def itq_of_queries(query: Array, gallery: Array, bits: int, start: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    """Boolean codes as SEM-PCYC's released code makes them: own means, components and rotation of the queries."""
    query, gallery = query - query.mean(0), gallery - gallery.mean(0)
    values, vectors = np.linalg.eigh(np.cov(query.T))
    components = vectors[:, np.argsort(-values)[:bits]]
    components = components * np.where(((query @ components) ** 3).sum(0) < 0, -1, 1)
    turn = itq_rotation(query @ components, start, 50)
    return query @ components @ turn > 0, gallery @ components @ turn > 0


def chance_ap(relevant: int, gallery: int) -> float:
    """Expected average precision of a random ranking: (R-1)/(N-1) (1 - H_N/N) + H_N/N."""
    share = sum(1 / rank for rank in range(1, gallery + 1)) / gallery
    return (relevant - 1) / (gallery - 1) * (1 - share) + share
