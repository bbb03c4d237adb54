"""Raw data to DATA shards: list, order by a seeded hash, write slice by slice, quarantine what is bad.

Listing gives every row its id and its place; a shard is then a fixed slice of the ordered list, so that each can be
written, and written again after a kill, on its own. Rows in = rows used + rows quarantined, always.
"""

import json
import logging
import shutil
from collections import Counter
from dataclasses import dataclass

from zsr import fault, progress
from zsr.artifact import Artifact, Plan, Staging, Store
from zsr.cluster import map_pieces
from zsr.data.decode import reads
from zsr.data.inspect import class_counts
from zsr.data.listing import Listing, listing
from zsr.data.sources import Source, differences
from zsr.data.writing import LAYOUT, files_of, write_slice
from zsr.errors import ConfigError, StorageError, TooManyBadRows

logger = logging.getLogger("zsr")


@dataclass(frozen=True)
class Prepare:
    """Settings that shape DATA.

    Attributes:
        rows_per_shard: rows a parquet file holds at most.
        max_bad_rows: a count ("20") or a share of all rows ("1%") beyond which the job stops with exit 3.
        seed: of the order of rows.
        bytes_per_shard: bytes of rows a parquet file holds at most, unless one row has more.

    Raises:
        ConfigError: a bound below 1, or `max_bad_rows` is neither.
    """

    rows_per_shard: int = 10_000
    max_bad_rows: str = "1%"
    seed: int = 0
    bytes_per_shard: int = 512 << 20

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "bytes_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")
        self.allowed(0)

    def allowed(self, rows: int) -> int:
        """How many bad rows are allowed among `rows`. Raises ConfigError unless a count or a percentage."""
        text = self.max_bad_rows.strip()
        try:
            if text.endswith("%"):
                return int(rows * float(text[:-1]) / 100)
            return int(text)
        except ValueError as error:
            raise ConfigError(f"--max-bad-rows {text!r}: expected a count such as 20 or a share such as 1%") from error


def plan(source: Source, rows: Listing, settings: Prepare) -> Plan:
    """The plan: content is shaped by the rows and the settings; raw files' times only tell stale staging apart."""
    config = {
        "source": dict(source.facts),
        "layout": LAYOUT,
        "rows_per_shard": settings.rows_per_shard,
        "bytes_per_shard": settings.bytes_per_shard,
        "seed": settings.seed,
        "rows_digest": rows.digest,
    }
    # with another decoder, other rows may be good ones
    return Plan("data", config, guard={"files": rows.guards, "max_bad_rows": settings.max_bad_rows, **reads()})


def prepare(source: Source, output: Store, settings: Prepare, listed: Listing | None = None) -> Artifact:
    """Write DATA to `output` and publish it; an equal plan that was finished before is returned as it is.

    Args:
        listed: what `listing` found, where the caller has it already.

    Raises:
        ConfigError: no row at all.
        TooManyBadRows: with the counts by kind; nothing is published.
    """
    rows = listing(source, settings.seed) if listed is None else listed
    if rows.count == 0:
        raise ConfigError(f"source {source.facts.get('name')}: no rows found; check --input")
    work = plan(source, rows, settings)
    if done := output.made(work):
        progress.up_to_date("prepare", output, output.versions())
        return done
    staging = output.staging(work)
    names = stage_listing(staging, rows, settings.rows_per_shard)
    todo = [{"name": name} for name in names if not files_of(staging, name)]
    progress.found_finished("prepare", len(names) - len(todo), len(names))
    shared = {"source": source, "staging": staging, "bytes_per_shard": settings.bytes_per_shard}
    sizes = rows.sizes(settings.rows_per_shard)
    map_pieces("prepare", write_slice, todo, rows=[sizes[piece["name"]] for piece in todo], fn_kwargs=shared)
    return _seal(source, staging, output, rows, names, settings)


def stage_listing(staging: Staging, rows: Listing, size: int) -> list[str]:
    """Stage which items go to which slice, so that a task reads only its own; returns the slices' names in order."""
    names = []
    for name, table in rows.slices(size):
        names.append(name)
        if staging.finished(f"listing/{name}", scratch=True) is None:
            staging.write_table(f"listing/{name}", table, scratch=True)
            fault.here("prepare.listing")
    return names


def _seal(
    source: Source, staging: Staging, output: Store, rows: Listing, names: list[str], settings: Prepare
) -> Artifact:
    entries = staging.all_finished(file for name in names for file in files_of(staging, name) or [name])
    kinds = _kinds(staging, rows)
    quarantined = len(rows.refused) + sum(int(entry.facts["quarantined"]) for entry in entries)
    allowed = settings.allowed(rows.count)
    if quarantined > allowed:
        raise TooManyBadRows(
            f"{quarantined} of {rows.count} rows bad {kinds}; --max-bad-rows {settings.max_bad_rows} allows {allowed}. "
            f"They are listed under {staging.where}/files/_quarantine; mend them or raise the limit"
        )
    per_modality = {
        modality: sum(int(e.facts["rows"]) for e in entries if e.path.startswith(f"modality={modality}/"))
        for modality in rows.rows
    }
    totals = {"in": rows.count, "used": sum(per_modality.values()), "quarantined": quarantined}
    if totals["used"] + quarantined != rows.count or sum(kinds.values()) != quarantined:
        raise StorageError(f"{staging.where}: {totals}, {kinds} do not add up; remove this folder and run again")
    said = differences(source, class_counts(entries))
    for difference in said:
        logger.warning("%s", difference)
    facts = {"rows": per_modality, "classes": list(rows.labels), "quarantine": kinds, "differences": said}
    artifact = staging.seal(facts=facts, rows=totals)
    output.publish(artifact)
    return artifact


def _kinds(staging: Staging, rows: Listing) -> dict[str, int]:
    """Bad rows by kind, those of the listing put into the quarantine first."""
    if rows.refused:
        with staging.piece("_quarantine/listing.jsonl") as path, path.open("wb") as handle:
            rows.refused.file.seek(0)
            shutil.copyfileobj(rows.refused.file, handle)
    kinds = Counter(rows.refused.kinds)
    for name in staging.pieces():
        if name.startswith("_quarantine/") and name != "_quarantine/listing.jsonl":
            kinds.update(json.loads(line)["kind"] for line in staging.read(name).splitlines())
    return dict(sorted(kinds.items()))
