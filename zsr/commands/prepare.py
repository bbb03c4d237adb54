"""Raw folders, fonts or parquet to DATA shards (and FEATURES, where the source brings them)."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from zsr.artifact import Store, open_artifact, write_atomically
from zsr.commands.base import JobConfig, Results, made, main, wrote
from zsr.data import prepare as rows
from zsr.data.features import import_features
from zsr.data.listing import listing
from zsr.data.sources import Source, registry
from zsr.data.sources.parquet import Columns
from zsr.data.sources.quickdraw import QuickDrawOptions
from zsr.data.sources.sketchy import SketchyOptions
from zsr.errors import ConfigError
from zsr.storage import local_path


class Config(JobConfig):
    """Flags of zsr prepare: --source, --input and --output to make DATA, or --inspect to look at it.

    Attributes:
        source: folders, pairs, parquet, webdataset, sketchy, tuberlin, quickdraw, wikipedia, or an installed package's;
            emoji is embedded and needs no input. docs/data.md has what each reads.
        output: ROOT of the DATA artifact.
        input: directory of the raw data.
        inspect: ROOT of a DATA artifact to look at; nothing is prepared.
        sheet: where --inspect writes its contact sheet, a PNG.
        sheet_rows: rows of each class and modality on it.
        features_output: ROOT of a FEATURES artifact; for wikipedia, and parquet that has a feature column.
        classes: rows of other classes are quarantined: "published" for the data set's own list, or a file of a name a
            line; all are allowed without it.
        columns: what the parquet columns are called.
        sketchy: which photos, and which rendering.
        quickdraw: how strokes are drawn, and which.
        rows_per_shard: rows a parquet file holds at most.
        bytes_per_shard: bytes of rows a parquet file holds at most; a slice of rows that has more makes several files.
        max_bad_rows: a count ("20") or a percentage ("1%") of bad rows beyond which the job stops with exit 3; auto is
            10% or 10 rows, whichever is more, but at most half of the rows.
        seed: of the order of rows.
    """

    source: str | None = None
    output: Path | None = None
    input: Path | None = None
    inspect: Path | None = None
    sheet: Path | None = None
    sheet_rows: int = Field(4, ge=1, le=50)
    features_output: Path | None = None
    classes: str = ""
    columns: Columns = Columns()
    sketchy: SketchyOptions = SketchyOptions()
    quickdraw: QuickDrawOptions = QuickDrawOptions()
    rows_per_shard: int = 10_000
    bytes_per_shard: int = 512 << 20
    max_bad_rows: str = "auto"
    seed: int = 0

    def settings(self) -> rows.Prepare:
        return rows.Prepare(self.rows_per_shard, self.max_bad_rows, self.seed, self.bytes_per_shard)

    def open_source(self) -> Source:
        if self.source is None:
            raise ConfigError(f"--source is missing: one of {', '.join(registry.SOURCES)}; or --inspect DATA")
        options = registry.Options(
            classes=self.classes, columns=self.columns, sketchy=self.sketchy, quickdraw=self.quickdraw
        )
        return registry.open_source(self.source, self.input, options)

    def store(self) -> Store:
        if self.output is None:
            raise ConfigError("--output is missing: the ROOT of the DATA artifact")
        return Store.at(self.output)


def plan(config: Config) -> Results:
    listed = listing(config.open_source(), config.seed)
    settings = config.settings()
    shards = {modality: -(-rows // settings.rows_per_shard) for modality, rows in listed.rows.items()}
    return {
        "rows": listed.rows,
        "shards": shards,
        "classes": len(listed.labels),
        "not_read": listed.unread,
        "refused": dict(sorted(listed.refused.kinds.items())),
        "bad_rows_allowed": settings.allowed(listed.count),
    }


def work(config: Config) -> Results:
    if config.inspect is not None:
        return look(config.inspect, config)
    source, settings, output = config.open_source(), config.settings(), config.store()
    listed = listing(source, settings.seed)
    rows.warn_unread(listed.unread)
    data = rows.prepare(source, output, settings, listed)
    results = made(data, output, rows=data.manifest["rows"], quarantine=data.facts["quarantine"])
    results["not_read"] = listed.unread
    if config.features_output is not None:
        features = import_features(source, listed, settings, data, Store.at(config.features_output))
        results |= {"features": made(features, config.features_output, rows=features.facts["rows"])}
    return results


def look(data: Path, config: Config) -> Results:
    """`--inspect`: the report as results, and the contact sheet beside the caller."""
    from zsr.data import inspect

    results, page = inspect.look(open_artifact(data, "data"), config.sheet_rows)
    sheet = config.sheet or local_path("contact_sheet.png")
    write_atomically(sheet, page)
    return wrote(sheet, "contact sheet", page, **results)


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr prepare")
