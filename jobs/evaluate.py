"""Checkpoints (and an index) to report.json and report.html."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs._job import JobConfig, Results, main
from zsr.artifact import Artifact, Store, open_artifact
from zsr.errors import ConfigError
from zsr.evaluation.compare import Bench, Settings, compare
from zsr.evaluation.pictures import pictures_of
from zsr.evaluation.report import Report, as_json, write


class Config(JobConfig):
    """Flags of jobs.evaluate.

    Attributes:
        data: DATA.
        features: FEATURES of that data.
        semantics: SEMANTICS, for the ridge floor.
        checkpoint: one or several checkpoints of the same split; those of one model with several seeds are grouped.
        output: directory of report.json and report.html; the ridge floor is kept below it.
        index_dir: an index of one checkpoint's unseen photos; its results stand beside the exact ones.
        title: of the page.
        k: results asked of the index a query.
    """

    data: Path
    features: Path
    semantics: Path
    checkpoint: tuple[Path, ...]
    output: Path
    index_dir: Path | None = None
    title: str = "Zero-shot retrieval: sketch to photo"
    k: int = 1000

    def bench(self) -> Bench:
        """The opened inputs. Raises what opening raises, and ConfigError where they do not fit each other."""
        return Bench(
            data=open_artifact(self.data, "data"),
            features=open_artifact(self.features, "features"),
            semantics=open_artifact(self.semantics, "semantics"),
            checkpoints=tuple(open_artifact(path, "checkpoint") for path in self.checkpoint),
        )

    def index(self) -> Artifact | None:
        """The index, if one is asked for. Raises ConfigError if it is of none of the checkpoints."""
        if self.index_dir is None:
            return None
        index = open_artifact(self.index_dir, "index")
        if index.facts["checkpoint"] not in {c.digest for c in self.bench().checkpoints}:
            raise ConfigError(
                f"--index-dir {self.index_dir} is of checkpoint {index.facts['checkpoint'][:12]}, which is "
                "none of those given with --checkpoint"
            )
        return index


def plan(config: Config) -> Results:
    bench, index = config.bench(), config.index()
    return {
        "checkpoints": [c.digest for c in bench.checkpoints],
        "unseen": list(bench.split.unseen),
        "index": None if index is None else index.digest,
        "output": str(config.output),
    }


def work(config: Config) -> Results:
    bench = config.bench()
    settings = Settings(title=config.title, k=config.k)
    report = compare(bench, config.index(), Store.at(config.output / "floors"), settings)
    write(config.output, report, pictures_of(bench.data, report))
    return headline(report, config.output)


def headline(report: Report, output: Path) -> Results:
    """The few numbers that a job prints."""
    values = as_json(report)
    exact = {row["name"]: row for row in values["rows"] if row["search"] is None}
    through = [row for row in values["rows"] if row["search"] is not None]
    shown = exact[values["shown"]]
    medians = {seeds["model"]: seeds["median"] for seeds in values["seeds"]}
    results: dict[str, Any] = {
        "model": shown["name"],
        "map_all_unseen": medians.get(shown["name"], shown["scores"]["mAP@all"]),
        "map_all_unseen_index": through[0]["scores"]["mAP@all"] if through else None,
        "chance": shown["chance"]["mAP@all"],
        "report": str(output / "report.html"),
    }
    floors = {f"floor_{name}": exact[name]["scores"]["mAP@all"] for name in ("raw", "ridge") if name in exact}
    peaks = {f"peak {n}": row["scores"]["mAP@all"] for n, row in exact.items() if row["kind"] == "peak"}
    by_seed = {seeds["model"]: seeds["scores"] for seeds in values["seeds"]}
    return {**results, **floors, **({"peaks": peaks} if peaks else {}), **({"seeds": by_seed} if by_seed else {})}


def run(argv: Sequence[str] | None = None) -> int:
    return main(Config, plan, work, argv)


if __name__ == "__main__":
    sys.exit(run())
