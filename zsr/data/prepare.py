"""Raw data to DATA shards: list, order by a seeded hash, write shard by shard, quarantine what is bad.

Listing gives every row its id and its place; a shard is then a fixed slice of the ordered list, so that each can be
written, and written again after a kill, on its own. Rows in = rows used + rows quarantined, always.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zsr import fault
from zsr.artifact import Artifact, Plan, Staging, Store, canonical, sha256
from zsr.cluster import map_pieces
from zsr.data.decode import BadImage, Limits, decode
from zsr.data.rows import MODALITIES, SCHEMA, order_key, row_id
from zsr.data.sources import Item, Source
from zsr.errors import ConfigError, StorageError, TooManyBadRows

PROBE: Final = 32  # pixels: a full decode proves that a picture is whole, and at this size it is cheap
TEXT_CAP: Final = 100_000  # characters
LISTING: Final = pa.schema([(field.name, pa.string()) for field in fields(Item)])


@dataclass(frozen=True)
class Bad:
    """A quarantined row: where it was to go, what it is, and why it is not used."""

    shard: str
    row: int
    id: int
    key: str
    kind: str
    message: str


@dataclass(frozen=True)
class Listing:
    """All items by modality, in hashed order, and the rows refused while listing."""

    items: dict[str, list[Item]]
    refused: tuple[Bad, ...]

    @property
    def count(self) -> int:
        return sum(map(len, self.items.values())) + len(self.refused)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({i.label for items in self.items.values() for i in items if i.label is not None}))


def listing(source: Source, seed: int) -> Listing:
    """Every item of `source` with its place. A repeated key or a colliding id is refused, the first one stays."""
    by_modality: dict[str, list[Item]] = {}
    refused: list[Bad] = []
    taken: dict[tuple[str, int], str] = {}
    for item in sorted(source.items(), key=lambda i: (i.modality, i.key or "", i.where)):
        if problem := _refusal(item, taken):
            refused.append(Bad(f"modality={item.modality}", -1, 0, str(item.key), *problem))
            continue
        taken[item.modality, row_id(item.modality, item.key)] = item.key
        by_modality.setdefault(item.modality, []).append(item)
    ordered = {}
    for modality, items in by_modality.items():
        ids = np.array([row_id(modality, item.key) for item in items], dtype=np.int64)
        ordered[modality] = [items[i] for i in np.argsort(order_key(ids, seed), kind="stable")]
    return Listing({m: ordered[m] for m in MODALITIES if m in ordered}, tuple(refused))


def _refusal(item: Item, taken: dict[tuple[str, int], str]) -> tuple[str, str] | None:
    if not item.key or "\0" in item.key:
        return "bad_key", f"key {item.key!r}; expected a non-empty string without NUL"
    other = taken.get((item.modality, row_id(item.modality, item.key)))
    if other == item.key:
        return "duplicate_key", f"{item.key!r} stands twice in {item.modality}; the first one is used"
    if other is not None:
        return "id_collision", f"the id of {item.key!r} equals that of {other!r}; rename one"
    return None


@dataclass(frozen=True)
class Prepare:
    """Settings that shape DATA.

    Attributes:
        rows_per_shard: rows a parquet file holds at most.
        max_bad_rows: a count ("20") or a share of all rows ("1%") beyond which the job stops with exit 3.
        seed: of the order of rows.
    """

    rows_per_shard: int = 10_000
    max_bad_rows: str = "1%"
    seed: int = 0

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
    items = [item for modality in rows.items.values() for item in modality]
    listed = [(i.modality, i.key, i.label, i.pair, i.text) for i in items]
    guards = sha256(canonical([i.guard for i in items]))
    config = {
        "source": dict(source.facts),
        "rows_per_shard": settings.rows_per_shard,
        "seed": settings.seed,
        "rows_digest": sha256(canonical(listed)),
    }
    return Plan("data", config, guard={"files": guards, "max_bad_rows": settings.max_bad_rows})


def prepare(source: Source, output: Store, settings: Prepare) -> Artifact:
    """Write DATA to `output` and publish it; an equal plan that was finished before is returned as it is.

    Raises:
        ConfigError: no row at all.
        TooManyBadRows: with the counts by kind; nothing is published.
    """
    rows = listing(source, settings.seed)
    if rows.count == 0:
        raise ConfigError(f"source {source.facts.get('name')}: no rows found; check --input")
    work = plan(source, rows, settings)
    if done := output.made(work):
        return done
    staging = output.staging(work)
    names = stage_listing(staging, rows, settings.rows_per_shard)
    todo = [{"name": name} for name in names if staging.finished(name) is None]
    map_pieces("prepare", _write_shard, todo, fn_kwargs={"source": source, "staging": staging})
    return _seal(staging, output, rows, names, settings)


def stage_listing(staging: Staging, rows: Listing, size: int) -> list[str]:
    """Stage which items go to which shard, so that a task reads only its own; returns the shard names in order."""
    names = []
    for modality, items in rows.items.items():
        for number, start in enumerate(range(0, len(items), size)):
            names.append(f"modality={modality}/part-{number:05d}.parquet")
            share = pa.Table.from_pylist([asdict(item) for item in items[start : start + size]], schema=LISTING)
            if staging.finished(f"listing/{names[-1]}", scratch=True) is None:
                staging.write_table(f"listing/{names[-1]}", share, scratch=True)
    return names


def staged_items(staging: Staging, name: str) -> list[Item]:
    """The items that `stage_listing` assigned to shard `name`."""
    data = staging.read(f"listing/{name}", scratch=True)
    return [Item(**row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()]


def _write_shard(piece: dict[str, Any], source: Source, staging: Staging) -> dict[str, Any]:
    """Load, check and stage one shard and its quarantine. Runs in a Ray task."""
    name = piece["name"]
    good: dict[int, dict[str, Any]] = {}
    bad: list[Bad] = []
    # in the order of the source's files, each of which is then read once, whatever the order of the rows
    for row, item in sorted(enumerate(staged_items(staging, name)), key=lambda pair: pair[1].where):
        identity = row_id(item.modality, item.key)
        try:
            good[row] = _load(source, item, identity)
        except BadImage as error:
            bad.append(Bad(name, row, identity, item.key, error.kind, str(error)))
    if bad:
        staging.write(f"_quarantine/{name}.jsonl", _jsonl(sorted(bad, key=lambda b: b.row)))
    fault.here("prepare.shard")
    rows = [good[row] for row in sorted(good)]
    classes = Counter(row["label"] for row in rows if row["label"] is not None)
    facts = {"rows": len(rows), "quarantined": len(bad), "classes": dict(sorted(classes.items()))}
    staging.write_table(name, pa.Table.from_pylist(rows, schema=SCHEMA), facts=facts)
    return {"name": name, **{k: facts[k] for k in ("rows", "quarantined")}}


def _load(source: Source, item: Item, identity: int) -> dict[str, Any]:
    """The row of `item`, its picture proved to decode. Raises BadImage with the quarantine's kind."""
    try:
        data = source.load(item)
    except OSError as error:
        raise BadImage("unreadable", str(error)) from error
    if data:
        decode(data, PROBE, Limits())
    elif item.where and item.text is None and source.feature(item) is None:
        raise BadImage("empty", "0 bytes, expected an encoded picture")
    if item.text is not None and (not item.text.strip() or len(item.text) > TEXT_CAP or "\0" in item.text):
        raise BadImage("bad_text", f"text of {len(item.text)} characters; expected 1 to {TEXT_CAP} without NUL")
    return {
        "id": identity,
        "key": item.key,
        "label": item.label,
        "pair": item.pair,
        "image": data or None,
        "text": item.text,
    }


def _jsonl(bad: Sequence[Bad]) -> bytes:
    return "".join(json.dumps(vars(b), sort_keys=True) + "\n" for b in bad).encode()


def _seal(staging: Staging, output: Store, rows: Listing, names: list[str], settings: Prepare) -> Artifact:
    entries = staging.all_finished(names)
    counts = [entry.facts for entry in entries]
    quarantined = len(rows.refused) + sum(int(c["quarantined"]) for c in counts)
    allowed = settings.allowed(rows.count)
    if quarantined > allowed:
        kinds = _kinds(staging, rows)
        raise TooManyBadRows(
            f"{quarantined} of {rows.count} rows bad {kinds}; --max-bad-rows {settings.max_bad_rows} allows {allowed}. "
            f"They are listed under {staging.directory / 'files' / '_quarantine'}; mend them or raise the limit"
        )
    if rows.refused:
        staging.write("_quarantine/listing.jsonl", _jsonl(rows.refused))
    per_modality = {
        modality: sum(int(e.facts["rows"]) for e in entries if e.path.startswith(f"modality={modality}/"))
        for modality in rows.items
    }
    totals = {"in": rows.count, "used": sum(per_modality.values()), "quarantined": quarantined}
    if totals["used"] + quarantined != rows.count:
        raise StorageError(f"{staging.directory}: {totals} do not add up; remove this folder and run again")
    facts = {"rows": per_modality, "classes": list(rows.labels), "quarantine": _kinds(staging, rows)}
    artifact = staging.seal(facts=facts, rows=totals)
    output.publish(artifact)
    return artifact


def _kinds(staging: Staging, rows: Listing) -> dict[str, int]:
    kinds = Counter(bad.kind for bad in rows.refused)
    for name in staging.pieces():
        if name.startswith("_quarantine/") and name != "_quarantine/listing.jsonl":
            kinds.update(json.loads(line)["kind"] for line in staging.read(name).splitlines())
    return dict(sorted(kinds.items()))
