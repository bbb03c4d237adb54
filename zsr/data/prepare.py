"""Convert raw data to DATA shards: list, order by a seeded hash, write slice by slice, quarantine bad rows.

Listing gives every row its id and its position; a shard is a fixed slice of the ordered list, so that each can be
written, and rewritten after a kill, independently. Rows in = rows used + rows quarantined, always.
"""

import itertools
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from zsr import faults, progress
from zsr.artifact import Artifact, Plan, Staging, Store
from zsr.data.decode import reads
from zsr.data.inspect import class_counts
from zsr.data.listing import Bad, Listing, listing
from zsr.data.sources import Source, differences
from zsr.data.writing import LAYOUT, files_of, write_slice
from zsr.errors import ConfigError, StorageError, TooManyBadRows
from zsr.executor import IMAGES, map_pieces

EXAMPLES: Final = 5  # max bad rows that a message shows, each of a different kind

logger = logging.getLogger("zsr")


@dataclass(frozen=True)
class Prepare:
    """Settings that determine DATA.

    Attributes:
        rows_per_shard: max rows per parquet file.
        max_bad_rows: max bad rows, as a count ("20") or a percentage of all rows ("1%"); with more the job stops with
            exit code 3. "auto" is 10% or 10 rows, whichever is larger, but at most half of the rows.
        seed: seed of the row order.
        bytes_per_shard: max bytes of rows per parquet file, unless one row has more.

    Raises:
        ConfigError: a bound below 1, or an invalid `max_bad_rows`.
    """

    rows_per_shard: int = 10_000
    max_bad_rows: str = "auto"
    seed: int = 0
    bytes_per_shard: int = 512 << 20

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "bytes_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        self.allowed(0)

    def allowed(self, rows: int) -> int:
        """Max bad rows among `rows`. Raises ConfigError unless `max_bad_rows` is auto, a count or a percentage."""
        text = self.max_bad_rows.strip()
        if text == "auto":
            return min(max(10, rows // 10), rows // 2)
        number = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text)
        if number is None:
            raise ConfigError(f"--max-bad-rows {text!r}: expected auto, a count such as 20, or a percentage such as 1%")
        return int(number[1]) if number[1] else int(rows * float(number[2]) / 100)


def plan(source: Source, rows: Listing, settings: Prepare) -> Plan:
    """The plan of DATA: rows and settings determine its content; times of raw files only separate staging areas."""
    config = {
        "source": dict(source.facts),
        "layout": LAYOUT,
        "rows_per_shard": settings.rows_per_shard,
        "bytes_per_shard": settings.bytes_per_shard,
        "seed": settings.seed,
        "rows_digest": rows.digest,
    }
    # a different decoder may accept different rows
    return Plan("data", config, guard={"files": rows.guards, "max_bad_rows": settings.max_bad_rows, **reads()})


def prepare(source: Source, output: Store, settings: Prepare, listed: Listing | None = None) -> Artifact:
    """Write DATA to `output` and publish it; if an identical plan was finished before, return its artifact.

    Args:
        listed: the result of `listing`, if the caller has it already.

    Raises:
        ConfigError: there is no row.
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
    rows_of_todo = [sizes[piece["name"]] for piece in todo]
    small = sum(rows_of_todo) <= IMAGES
    map_pieces("prepare", write_slice, todo, small=small, rows=rows_of_todo, fn_kwargs=shared)
    return _seal(source, staging, output, rows, names, settings)


def stage_listing(staging: Staging, rows: Listing, size: int) -> list[str]:
    """Stage the items of every slice, so that a task reads only its own; returns the slices' names in order."""
    names = []
    for name, table in rows.slices(size):
        names.append(name)
        if staging.finished(f"listing/{name}", scratch=True) is None:
            staging.write_table(f"listing/{name}", table, scratch=True)
            faults.here("prepare.listing")
    return names


def _seal(
    source: Source, staging: Staging, output: Store, rows: Listing, names: list[str], settings: Prepare
) -> Artifact:
    entries = staging.all_finished(file for name in names for file in files_of(staging, name) or [name])
    kinds, examples = _kinds(staging, rows)
    quarantined = len(rows.refused) + sum(int(entry.facts["quarantined"]) for entry in entries)
    allowed = settings.allowed(rows.count)
    said = f"{quarantined} of {rows.count} rows are bad {kinds}"
    shown = "; ".join(f"{bad.kind}: {bad.key}: {bad.message.rstrip('.')}" for bad in examples)
    if quarantined > min(allowed, rows.count - 1):  # at least one row must be left
        raise TooManyBadRows(
            f"{said}; --max-bad-rows {settings.max_bad_rows} allows {allowed}. For example: {shown}. All are listed "
            f"in {staging.where}/files/_quarantine; fix them or raise --max-bad-rows"
        )
    per_modality = {
        modality: sum(int(e.facts["rows"]) for e in entries if e.path.startswith(f"modality={modality}/"))
        for modality in rows.rows
    }
    totals = {"in": rows.count, "used": sum(per_modality.values()), "quarantined": quarantined}
    if totals["used"] + quarantined != rows.count or sum(kinds.values()) != quarantined:
        raise StorageError(f"{staging.where}: {totals} and {kinds} do not add up; remove this folder and run again")
    differing = differences(source, class_counts(entries))
    for difference in differing:
        logger.warning("%s", difference)
    facts = {"rows": per_modality, "classes": list(rows.labels), "quarantine": kinds, "differences": differing}
    artifact = staging.seal(facts=facts, rows=totals)
    output.publish(artifact)
    if quarantined:
        place = f"{output}/objects/{artifact.digest}/_quarantine"
        logger.warning("%s, within the limit. For example: %s. All are listed in %s", said, shown, place)
    return artifact


def warn_unread(unread: Mapping[str, int]) -> None:
    """Log how many input files were skipped, by file extension or reason."""
    if unread:
        shown = ", ".join(f"{name} {count}" for name, count in sorted(unread.items(), key=lambda each: -each[1]))
        logger.warning("not read: %d files (%s)", sum(unread.values()), shown)


def _kinds(staging: Staging, rows: Listing) -> tuple[dict[str, int], list[Bad]]:
    """Count bad rows by kind, with one example of each of the EXAMPLES most frequent; stage those of the listing."""
    if rows.refused:
        with staging.piece("_quarantine/listing.jsonl") as path, path.open("wb") as handle:
            rows.refused.file.seek(0)
            shutil.copyfileobj(rows.refused.file, handle)
    kinds: Counter[str] = Counter()
    first: dict[str, Bad] = {}
    for bad in itertools.chain(rows.refused, _quarantined(staging)):
        kinds[bad.kind] += 1
        first.setdefault(bad.kind, bad)
    return dict(sorted(kinds.items())), [first[kind] for kind, _ in kinds.most_common(EXAMPLES)]


def _quarantined(staging: Staging) -> Iterator[Bad]:
    """Yield the bad rows of all slices."""
    for name in sorted(staging.pieces()):
        if name.startswith("_quarantine/") and name != "_quarantine/listing.jsonl":
            yield from (Bad(**json.loads(line)) for line in staging.read(name).splitlines())
