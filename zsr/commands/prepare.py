"""Convert raw folders, archives or parquet to DATA shards (and FEATURES, if the source has them)."""

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
    """Convert raw data to DATA (--source, --input, --output), or inspect a DATA artifact (--inspect).

    Attributes:
        source: folders, pairs, parquet, webdataset, sketchy, tuberlin, quickdraw, wikipedia, or a source of an
            installed package; emoji is embedded and needs no input. docs/data.md describes what each reads.
        output: ROOT of the DATA artifact.
        input: directory of the raw data.
        inspect: ROOT of a DATA artifact to inspect; nothing is prepared.
        sheet: path of the contact sheet (PNG) that --inspect writes.
        sheet_rows: rows per class and modality on it.
        features_output: ROOT of a FEATURES artifact; for wikipedia, and for parquet with a feature column.
        classes: allowed classes; rows of other classes are quarantined. "published" for the data set's own list, or a
            file with one name per line; by default all classes.
        columns: names of the parquet columns.
        sketchy: which photos and which rendering of Sketchy to read.
        quickdraw: which drawings of QuickDraw to read.
        rows_per_shard: max rows per parquet file.
        bytes_per_shard: max bytes of rows per parquet file; a larger shard is split into several files.
        max_bad_rows: max bad rows, as a count ("20") or a percentage ("1%"); with more the job stops with exit code 3.
            auto is 10% or 10 rows, whichever is larger, but at most half of the rows.
        seed: seed of the row order.
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
            raise ConfigError(f"--source is missing: give one of {', '.join(registry.SOURCES)}; or --inspect DATA")
        options = registry.Options(
            classes=self.classes, columns=self.columns, sketchy=self.sketchy, quickdraw=self.quickdraw
        )
        return registry.open_source(self.source, self.input, options)

    def store(self) -> Store:
        if self.output is None:
            raise ConfigError("--output is missing: give the ROOT of the DATA artifact")
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
    """`--inspect`: return the report as results, and write the contact sheet (by default to the current folder)."""
    from zsr.data import inspect

    results, page = inspect.look(open_artifact(data, "data"), config.sheet_rows)
    sheet = config.sheet or local_path("contact_sheet.png")
    write_atomically(sheet, page)
    return wrote(sheet, "contact sheet", page, **results)


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr prepare")
