"""DATA of small pictures, written in this process: what tests of streams read."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from zsr.artifact import Artifact, Plan, Store
from zsr.data.rows import SCHEMA, order_key, row_id

CLASSES = ("ant", "bee", "cow", "dog", "elk")
SIDE = 12


def png(number: int) -> bytes:
    """A picture whose colour tells its number."""
    out = io.BytesIO()
    colour = (number % 256, number // 256, 90)
    Image.new("RGB", (SIDE, SIDE), colour).save(out, "PNG")
    return out.getvalue()


def write(
    root: Path,
    each: int = 30,
    classes: tuple[str, ...] = CLASSES,
    image: Callable[[str, int], bytes | None] = lambda _, number: png(number),
    *,
    shard: int = 40,
    group: int = 8,
) -> Artifact:
    """`each` sketches and photos a class, in hashed order; sketch i belongs to photo i, and `image` draws both."""
    store = Store.at(root)
    staging = store.staging(Plan("data", {"each": each}))
    for modality in ("sketch", "photo"):
        rows = [
            {
                "id": row_id(modality, f"{number}"),
                "key": f"{number}",
                "label": classes[number % len(classes)],
                "pair": f"{number}" if modality == "sketch" else None,
                "image": image(classes[number % len(classes)], number),
            }
            for number in range(each * len(classes))
        ]
        order = np.argsort(order_key(np.array([row["id"] for row in rows]), 0))
        for part in range(0, len(rows), shard):
            table = pa.Table.from_pylist([rows[i] for i in order[part : part + shard]], schema=SCHEMA)
            with staging.piece(f"modality={modality}/part-{part // shard:05d}.parquet") as path:
                pq.write_table(table, path, compression="zstd", row_group_size=group)
    facts = {"rows": {"sketch": each * len(classes), "photo": each * len(classes)}, "classes": list(classes)}
    artifact = staging.seal(facts=facts)
    store.publish(artifact)
    return artifact
