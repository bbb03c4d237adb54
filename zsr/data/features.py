"""FEATURES: `id int64, feature fixed_size_list<float16 | float32>[D]`, one shard per DATA shard.

A feature shard has the name of its DATA shard and a subset of its rows in the same order, so that the two are joined
shard by shard, without a shuffle.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from zsr import faults, progress
from zsr.artifact import Artifact, Plan, Staging, Store
from zsr.data.listing import Listing
from zsr.data.prepare import Prepare, stage_listing
from zsr.data.rows import row_id
from zsr.data.sources import Source
from zsr.data.writing import slice_of, staged_items
from zsr.errors import ConfigError, DamagedArtifact
from zsr.executor import VECTORS, map_pieces


def feature_table(ids: Sequence[int], features: np.ndarray) -> pa.Table:
    """Arrow table of N ids and features (N, D), float16 or float32."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    return pa.table({"id": pa.array(ids, pa.int64()), "feature": column})


def vectors(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """A fixed-size-list column as (N, D), without a copy if it is one chunk.

    Raises:
        DamagedArtifact: another type, or a null.
    """
    if not pa.types.is_fixed_size_list(column.type) or column.null_count:
        raise DamagedArtifact(
            f"{where}: found {column.type} with {column.null_count} nulls, expected fixed_size_list without nulls"
        )
    array = column.combine_chunks()
    flat = array.flatten() if isinstance(array, pa.Array) else pa.concat_arrays([c.flatten() for c in column.chunks])
    if flat.null_count:
        raise DamagedArtifact(f"{where}: a vector holds a null; expected numbers")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), column.type.list_size)


def seal_features(staging: Staging, output: Store, names: Sequence[str], about: dict[str, Any]) -> Artifact:
    """Seal and publish FEATURES from the finished shards `names`.

    Raises:
        ConfigError: no row has a feature, or the features of a modality differ in width.
    """
    entries = staging.all_finished(names)
    if not any(int(entry.facts["rows"]) for entry in entries):
        raise ConfigError("no row has a feature; check that the feature column, or the images, exist")
    modalities = sorted({e.path.partition("/")[0].partition("=")[2] for e in entries if int(e.facts["rows"])})
    dims = {m: {int(e.facts["dim"]) for e in entries if e.path.startswith(f"modality={m}/")} - {0} for m in modalities}
    if wrong := {m: sorted(d) for m, d in dims.items() if len(d) > 1}:
        raise ConfigError(f"features of different widths within a modality: {wrong}; they must agree")
    rows = {m: sum(int(e.facts["rows"]) for e in entries if e.path.startswith(f"modality={m}/")) for m in modalities}
    quarantined = sum(int(e.facts["quarantined"]) for e in entries)
    facts = {**about, "dims": {m: next(iter(d)) for m, d in dims.items() if d}, "rows": rows}
    used = sum(rows.values())
    totals = {"in": used + quarantined, "used": used, "quarantined": quarantined}
    artifact = staging.seal(facts=facts, rows=totals)
    output.publish(artifact)
    return artifact


def import_features(source: Source, rows: Listing, settings: Prepare, data: Artifact, output: Store) -> Artifact:
    """Write FEATURES from the precomputed vectors of a source.

    Raises:
        ConfigError: vectors of different widths, or no vector.
    """
    # the vectors are not in DATA, so its digest does not change with them; file times detect new vectors
    guard = {"files": rows.guards, "source": dict(source.facts)}
    plan = Plan("features", {"backbone": "imported"}, {"data": data.digest}, guard)
    if done := output.made(plan):
        progress.up_to_date("import features", output, output.versions())
        return done
    staging = output.staging(plan)
    stage_listing(staging, rows, settings.rows_per_shard)
    names = [entry.path for entry in data.shards()]
    todo = [{"name": name} for name in names if staging.finished(name) is None]
    progress.found_finished("import features", len(names) - len(todo), len(names))
    sizes = [int(data.entry(piece["name"]).facts["rows"]) for piece in todo]
    shared = {"source": source, "data": data, "staging": staging}
    small = sum(sizes) <= VECTORS
    map_pieces("import features", _import_shard, todo, small=small, rows=sizes, fn_kwargs=shared)
    return seal_features(staging, output, names, {"backbone": "imported"})


def _import_shard(piece: dict[str, Any], source: Source, data: Artifact, staging: Staging) -> dict[str, Any]:
    """Stage the vectors of one shard's rows. Runs in a Ray task."""
    name = piece["name"]
    used = set(data.read_table(name, columns=["id"]).column("id").to_pylist())
    items = {row_id(i.modality, i.key): i for i in staged_items(staging, slice_of(name))}
    items = {identity: item for identity, item in items.items() if identity in used}
    # in file order, so that each file is read once
    found = {}
    for identity in sorted(items, key=lambda i: items[i].where):
        found[identity] = source.feature(items[identity])
        progress.advance()
    ids = [identity for identity in items if found[identity] is not None]
    kept = [vector for identity in ids if (vector := found[identity]) is not None]
    widths = {vector.shape[0]: items[identity].key for identity, vector in zip(ids, kept, strict=True)}
    if len(widths) > 1:
        shown = ", ".join(f"{width} ({key!r})" for width, key in sorted(widths.items()))
        raise ConfigError(f"{name}: features of several widths, such as {shown}; they must agree per modality")
    faults.here("features.shard")
    dim = next(iter(widths), 0)
    matrix = np.stack(kept) if kept else np.zeros((0, 0), np.float32)
    facts = {"rows": len(ids), "quarantined": len(used) - len(ids), "dim": dim}
    staging.write_table(name, feature_table(ids, matrix), facts=facts)
    return {"name": name, "rows": len(ids)}
