"""Raw folders, fonts or parquet to DATA shards (and FEATURES, where the source brings them)."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from jobs._job import JobConfig, Results, main
from zsr.artifact import Store
from zsr.data import prepare as rows
from zsr.data.features import import_features
from zsr.data.sources import Source, directory
from zsr.data.sources.emoji import Emoji
from zsr.data.sources.pairs import Pairs
from zsr.data.sources.parquet import Columns, Parquet
from zsr.data.sources.sketchy import Sketchy
from zsr.data.sources.wikipedia import Wikipedia

FOLDERS: Final[dict[str, Callable[[Path], Source]]] = {"sketchy": Sketchy, "pairs": Pairs, "wikipedia": Wikipedia}


class Config(JobConfig):
    """Flags of jobs.prepare.

    Attributes:
        source: emoji (embedded, needs no input), sketchy (photo/CLASS, sketch/CLASS), pairs (tables of images and
            texts), wikipedia (its lists and raw features) or parquet.
        output: ROOT of the DATA artifact.
        input: directory of the raw data.
        features_output: ROOT of a FEATURES artifact; for wikipedia, and parquet that has a feature column.
        columns: what the parquet columns are called.
        rows_per_shard: rows a parquet file holds at most.
        max_bad_rows: a count or a share beyond which the job stops with exit 3.
        seed: of the order of rows.
    """

    source: Literal["emoji", "sketchy", "pairs", "wikipedia", "parquet"]
    output: Path
    input: Path | None = None
    features_output: Path | None = None
    columns: Columns = Columns()
    rows_per_shard: int = 10_000
    max_bad_rows: str = "1%"
    seed: int = 0

    def settings(self) -> rows.Prepare:
        return rows.Prepare(self.rows_per_shard, self.max_bad_rows, self.seed)

    def open_source(self) -> Source:
        if self.source == "emoji":
            return Emoji()
        root = directory(self.input, self.source)
        if self.source == "parquet":
            return Parquet(root, self.columns)
        return FOLDERS[self.source](root)


def plan(config: Config) -> Results:
    listed = rows.listing(config.open_source(), config.seed)
    shards = {m: -(-len(items) // config.rows_per_shard) for m, items in listed.items.items()}
    counts = {m: len(items) for m, items in listed.items.items()}
    allowed = config.settings().allowed(listed.count)
    return {"rows": counts, "shards": shards, "classes": len(listed.labels), "bad_rows_allowed": allowed}


def work(config: Config) -> Results:
    source, settings = config.open_source(), config.settings()
    data = rows.prepare(source, Store.at(config.output), settings)
    results = {"data": data.digest, "rows": data.manifest["rows"], "quarantine": data.facts["quarantine"]}
    if config.features_output is not None:
        listed = rows.listing(source, settings.seed)
        features = import_features(source, listed, settings, data, Store.at(config.features_output))
        results |= {"features": features.digest, "feature_rows": features.facts["rows"]}
    return results


def run(argv: Sequence[str] | None = None) -> int:
    return main(Config, plan, work, argv)


if __name__ == "__main__":
    sys.exit(run())
