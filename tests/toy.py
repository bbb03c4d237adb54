"""A small generated data set: shapes as drawings and as coloured pictures in the Sketchy layout, or features."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

CLASSES = ("apple", "ball", "cat", "dog", "egg", "fish", "goat", "house", "king", "lion")
SIZE = 48


def polygon(label: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """A star whose number of points tells the class, moved and scaled a little."""
    points = 3 + label
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, 8, 18) * rng.uniform(0.85, 1.1)
    centre = SIZE / 2 + rng.uniform(-3, 3, 2)
    return [(centre[0] + r * np.cos(a), centre[1] + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]


def write_pictures(root: Path, classes: tuple[str, ...] = CLASSES, each: int = 8) -> Path:
    """photo/CLASS/N.png and sketch/CLASS/N-1.png; the sketch outlines its photo's shape."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        for modality in ("photo", "sketch"):
            (root / modality / name).mkdir(parents=True)
        for number in range(each):
            shape = polygon(label, rng)
            photo = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(150, 255, 3).tolist()))
            ImageDraw.Draw(photo).polygon(shape, fill=(25 * label, 255 - 25 * label, 120))
            photo.save(root / "photo" / name / f"{number}.png")
            sketch = Image.new("RGB", (SIZE, SIZE), "white")
            ImageDraw.Draw(sketch).polygon(shape, outline="black", width=2)
            sketch.save(root / "sketch" / name / f"{number}-1.png")
    return root


def write_features(
    root: Path, classes: tuple[str, ...] = CLASSES, each: int = 12, poison: tuple[str, ...] = ()
) -> Path:
    """modality=NAME/rows.parquet with 24-d sketch and 32-d photo features; those of `poison` classes overflow."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(classes), 16))
    for modality, dim in (("sketch", 24), ("photo", 32)):
        view = rng.normal(size=(16, dim))
        rows = [(label, number) for label in range(len(classes)) for number in range(each)]
        features = [(centres[label] + 0.5 * rng.normal(size=16)) @ view for label, _ in rows]
        bad = [classes[label] in poison for label, _ in rows]
        values = [np.full(dim, 1e30) if b else f for b, f in zip(bad, features, strict=True)]
        table = pa.table(
            {
                "key": [f"{classes[label]}/{number}" for label, number in rows],
                "label": [classes[label] for label, _ in rows],
                "pair": [f"{classes[label]}/{number}" if modality == "sketch" else None for label, number in rows],
                "feature": pa.array([v.astype(np.float32).tolist() for v in values], pa.list_(pa.float32())),
            }
        )
        (root / f"modality={modality}").mkdir(parents=True)
        pq.write_table(table, root / f"modality={modality}" / "rows.parquet")
    return root
