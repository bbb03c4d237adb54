"""The Wikipedia image-text set (Rasiwasia et al., ACM MM 2010): its lists and raw features, as published.

    ROOT/categories.list                 the names of the 10 classes, a line each
    ROOT/trainset_txt_img_cat.list       TEXT <tab> IMAGE <tab> CLASS (from 1), a line a pair; testset_... likewise
    ROOT/raw_features.mat                I_tr, I_te (128 numbers a picture), T_tr, T_te (10 a text), in the lists' order

Pictures and texts themselves are not among these files, so rows have neither, and the features are imported with
`--features-output`. Keys begin with the part, train/ or test/, since the field ranks the test part of the unseen
classes against itself. A text's `pair` is its photo. Whoever has pictures and texts takes the source `pairs`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from zsr.data.rows import canonical_label
from zsr.data.sources import Item, file_guard
from zsr.errors import ConfigError, DamagedArtifact

MATRICES: Final = "raw_features.mat"
PARTS: Final = {"train": "tr", "test": "te"}


@dataclass(frozen=True)
class Wikipedia:
    """`root` holds the lists and the features; an item's `where` is MATRIX:ROW."""

    root: Path

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "wikipedia", "attribution": "Wikipedia image-text set, Rasiwasia et al., ACM MM 2010"}

    def items(self) -> Iterator[Item]:
        """A photo row and a text row for every line of both lists.

        Raises:
            ConfigError: a list is missing, malformed, or not as long as its features.
            DamagedArtifact: the features are not a MATLAB file with the four matrices.
        """
        file = self._file(MATRICES)
        guard, names = file_guard(file), self._file("categories.list").read_text().split()
        for part, short in PARTS.items():
            path = self._file(f"{part}set_txt_img_cat.list")
            lines = path.read_text().splitlines()
            for matrix in (f"I_{short}", f"T_{short}"):
                if (rows := len(_matrix(str(file), matrix))) != len(lines):
                    raise ConfigError(f"{path}: {len(lines)} lines, but {rows} rows in {matrix}; they go line by line")
            for row, line in enumerate(lines):
                text, image, label = _fields(line, names, f"{path}:{row + 1}")
                photo = f"{part}/{image}"
                yield Item("photo", photo, label, where=f"I_{short}:{row}", guard=guard)
                yield Item("text", f"{part}/{text}", label, pair=photo, where=f"T_{short}:{row}", guard=guard)

    def load(self, item: Item) -> bytes:
        """No bytes: the set has no pictures."""
        return b""

    def feature(self, item: Item) -> np.ndarray:
        """The raw feature, (128,) of a photo or (10,) of a text, float32."""
        name, _, row = item.where.partition(":")
        return np.asarray(_matrix(str(self.root / MATRICES), name)[int(row)], dtype=np.float32)

    def _file(self, name: str) -> Path:
        if not (self.root / name).is_file():
            raise ConfigError(
                f"{self.root / name}: missing; --source wikipedia wants the lists and {MATRICES} as published"
            )
        return self.root / name


def _fields(line: str, names: list[str], where: str) -> tuple[str, str, str]:
    """Text, image and class of a line of a list."""
    fields = line.split()
    if len(fields) != 3 or not fields[2].isdigit() or not 1 <= int(fields[2]) <= len(names):
        raise ConfigError(f"{where}: {line!r}; expected TEXT, IMAGE and a class of 1 to {len(names)}")
    return fields[0], fields[1], canonical_label(names[int(fields[2]) - 1])


@lru_cache(maxsize=4)
def _matrix(file: str, name: str) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ConfigError("MATLAB files are read by scipy; install zsr with the extra 'text'") from None
    try:
        matrix = np.asarray(loadmat(file, variable_names=[name])[name], dtype=np.float32)
    except Exception as error:  # the parser raises whatever damaged bytes make of it
        raise DamagedArtifact(f"{file}: no readable matrix {name} ({error!r}); fetch the file again") from error
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise DamagedArtifact(f"{file}: {name} is {matrix.shape} or not finite, expected rows of numbers")
    return matrix
