"""The Wikipedia image-text set (Rasiwasia et al., ACM MM 2010): its lists and raw features, as published.

    ROOT/categories.list                 the names of the 10 classes, one per line
    ROOT/trainset_txt_img_cat.list       TEXT <tab> IMAGE <tab> CLASS (from 1), one pair per line; testset_... likewise
    ROOT/raw_features.mat                I_tr, I_te (128 numbers per image), T_tr, T_te (10 per text), in list order

These files contain no images or texts, so rows have neither, and the features are imported with `--features-output`;
images below ROOT that the lists name are ignored. Keys begin with the part, train/ or test/, since the literature
retrieves within the test part of the unseen classes. A text's `pair` is its photo. If you have the images and texts,
use the source `pairs`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from zsr.data.rows import canonical_label
from zsr.data.sources import Item, file_guard
from zsr.data.sources.tree import TreeSource, misplaced
from zsr.errors import ConfigError, DamagedArtifact
from zsr.storage import read_text

MATRICES: Final = "raw_features.mat"
PARTS: Final = {"train": "tr", "test": "te"}


@dataclass(frozen=True)
class Wikipedia(TreeSource):
    """Source over a `root` with the lists and the features; an item's `where` is MATRIX:ROW."""

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"name": "wikipedia", "attribution": "Wikipedia image-text set, Rasiwasia et al., ACM MM 2010"}

    def items(self) -> Iterator[Item]:
        """Yield a photo row and a text row for every line of both lists.

        Raises:
            ConfigError: a list is missing, malformed, or not as long as its features.
            DamagedArtifact: the features are not a MATLAB file with the four matrices.
        """
        file = self._file(MATRICES)
        guard, names = file_guard(file), read_text(self._file("categories.list"), "list").split()
        images: set[str] = set()
        for part, short in PARTS.items():
            path = self._file(f"{part}set_txt_img_cat.list")
            lines = read_text(path, "list").splitlines()
            for matrix in (f"I_{short}", f"T_{short}"):
                if (rows := len(_matrix(str(file), matrix, guard))) != len(lines):
                    raise ConfigError(f"{path}: {len(lines)} lines, but {rows} rows in {matrix}; they must be equal")
            for row, line in enumerate(lines):
                text, image, label = _fields(line, names, f"{path}:{row + 1}")
                photo = f"{part}/{image}"
                images.add(image)
                yield Item("photo", photo, label, where=f"I_{short}:{row}", guard=guard)
                yield Item("text", f"{part}/{text}", label, pair=photo, where=f"T_{short}:{row}", guard=guard)
        for found, entry in self.tree.images():
            if PurePosixPath(found).stem in images:
                self.tree.unread["images of rows (their features are read instead)"] += 1
            else:
                yield misplaced(found, entry, "No list names the image; remove it, or take the source pairs.")

    def load(self, item: Item) -> bytes:
        """b"": the data set has no images."""
        item.refuse()
        return b""

    def feature(self, item: Item) -> np.ndarray:
        """The raw feature, (128,) of a photo or (10,) of a text, float32."""
        name, _, row = item.where.partition(":")
        file = Path(self.root) / MATRICES
        return np.asarray(_matrix(str(file), name, file_guard(file))[int(row)], dtype=np.float32)

    def _file(self, name: str) -> Path:
        path = Path(self.root) / name
        if not path.is_file():
            raise ConfigError(f"{path}: missing; --source wikipedia requires the lists and {MATRICES} as published")
        return path


def _fields(line: str, names: list[str], where: str) -> tuple[str, str, str]:
    """Text, image and class of one line of a list."""
    fields = line.split()
    if len(fields) != 3 or not fields[2].isdigit() or not 1 <= int(fields[2]) <= len(names):
        raise ConfigError(f"{where}: {line!r}; expected TEXT, IMAGE and a class of 1 to {len(names)}")
    return fields[0], fields[1], canonical_label(names[int(fields[2]) - 1])


@lru_cache(maxsize=4)
def _matrix(file: str, name: str, guard: str) -> np.ndarray:
    """One matrix of a file, read again when its guard changes."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ConfigError("MATLAB files are read by scipy; install zsr with the extra 'text'") from None
    try:
        matrix = np.asarray(loadmat(file, variable_names=[name])[name], dtype=np.float32)
    except Exception as error:  # on damaged bytes the parser may raise anything
        raise DamagedArtifact(f"{file}: no readable matrix {name} ({error!r}); download the file again") from error
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise DamagedArtifact(f"{file}: {name} is {matrix.shape} or not finite, expected rows of numbers")
    return matrix
