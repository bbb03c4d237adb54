"""Encoded images of a few rows of DATA, for the example results in the report."""

from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from zsr.artifact import Artifact
from zsr.evaluation.report import Report


def pictures_of(data: Artifact, report: Report) -> Callable[[str, int], bytes | None]:
    """Return a lookup (modality, id) -> encoded image for every example in the report; one pass over the shards."""
    examples = [example for row in report.rows for example in row.evaluation.examples]
    wanted = {
        report.query_modality: {example.id for example in examples},
        report.gallery_modality: {hit.id for example in examples for hit in example.hits},
    }
    found = {(m, i): image for m, ids in wanted.items() for i, image in _read(data, m, ids)}
    return lambda modality, identity: found.get((modality, identity))


def _read(data: Artifact, modality: str, ids: set[int]) -> Iterable[tuple[int, bytes | None]]:
    for entry in data.shards(modality):
        table = data.read_table(entry.path, columns=["id", "image"])
        hits = table.filter(pc.is_in(table.column("id"), value_set=pa.array(sorted(ids), pa.int64())))
        yield from zip(hits.column("id").to_pylist(), hits.column("image").to_pylist(), strict=True)
