"""Rows of DATA: schema, ids, and the seeded order in which they are written.

| column | type | meaning |
|---|---|---|
| id | int64 | 63-bit BLAKE2b of (modality, key) |
| key | string | the user's name of the item, unique in its modality |
| label | string, nullable | class name in its canonical spelling; null in an unlabeled gallery |
| pair | string, nullable | key of the item that it was drawn from or belongs to |
| image | binary, nullable | encoded image as received, in any format that zsr.data.decode reads |
| text | string, nullable | |
"""

import hashlib
import re
from typing import Final, Literal, get_args

import numpy as np
import pyarrow as pa

from zsr.errors import ConfigError

Modality = Literal["sketch", "photo", "text"]
MODALITIES: Final[tuple[Modality, ...]] = get_args(Modality)

SCHEMA: Final = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("pair", pa.string()),
        pa.field("image", pa.binary()),
        pa.field("text", pa.string()),
    ]
)


def row_id(modality: str, key: str) -> int:
    """63-bit BLAKE2b of (modality, key): the same item has the same id in every rebuild."""
    digest = hashlib.blake2b(f"{modality}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def canonical_label(name: str) -> str:
    """Canonical spelling of a class name: lower case, spaces and hyphens become underscores, parentheses stay.

    Published lists, folders and vocabularies spell the same class differently (hot-air_balloon, palm tree).

    >>> canonical_label("hot-air balloon")
    'hot_air_balloon'
    """
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


WORD: Final = 2**64
STEP: Final = 0x9E3779B97F4A7C15  # increment of SplitMix64; FIRST and SECOND are the factors of its finalizer
FIRST: Final = 0xBF58476D1CE4E5B9
SECOND: Final = 0x94D049BB133111EB


def order_key(ids: np.ndarray, seed: int) -> np.ndarray:
    """A seeded 64-bit hash of each id, (N,) int64 -> (N,) uint64: sorting by it shuffles rows the same way each time.

    It is the finalizer of SplitMix64, a bijection, so that distinct ids have distinct keys.
    """
    mixed = ids.astype(np.uint64) + np.uint64((seed + 1) * STEP % WORD)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(FIRST)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(SECOND)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


def order_key_of_one(value: int, seed: int) -> int:
    """`order_key` of one id in 0..2^64 - 1: a training step needs several, and arrays of one element are slow."""
    mixed = (value + (seed + 1) * STEP) % WORD
    mixed = (mixed ^ (mixed >> 30)) * FIRST % WORD
    mixed = (mixed ^ (mixed >> 27)) * SECOND % WORD
    return mixed ^ (mixed >> 31)


def home_rank(ids: np.ndarray, world: int) -> np.ndarray:
    """The rank that holds an item, (N,) int64 -> (N,) int64. Pass the id of the pair if an item has one."""
    return np.asarray(order_key(ids, seed=1) % np.uint64(world), dtype=np.int64)


def require_modality(name: str) -> Modality:
    """`name` as a Modality. Raises ConfigError if it is none."""
    for modality in MODALITIES:
        if modality == name:
            return modality
    raise ConfigError(f"unknown modality {name!r}; expected one of {list(MODALITIES)}")
