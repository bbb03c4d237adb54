"""Neighbours of embedded queries: `python -m jobs.search --index-dir I --queries EMB --output neighbours.json`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from jobs._job import JobConfig, Results, main
from zsr.artifact import open_artifact
from zsr.index.search import Searcher, require_suffix, write_answers


class Search(JobConfig):
    """Search an index.

    Attributes:
        index_dir: ROOT of the index, or one object in it.
        queries: EMB of the queries, from the checkpoint that embedded the gallery.
        output: .json or .parquet, one row a neighbour.
        k: neighbours a query.
        nprobe: lists to look into; the published operating point if not given.
        refine_factor: candidates to re-rank, in multiples of k; the published operating point if not given.
    """

    index_dir: Path
    queries: Path
    output: Path
    k: int = Field(default=10, ge=1)
    nprobe: int | None = Field(default=None, ge=1)
    refine_factor: int | None = Field(default=None, ge=1)


def plan(config: Search) -> Results:
    require_suffix(config.output)
    index, queries = open_artifact(config.index_dir, "index"), open_artifact(config.queries, "embeddings")
    point = index.facts["operating_point"]
    return {
        "index": index.digest,
        "queries": queries.facts["rows"],
        "nprobe": config.nprobe or point["nprobe"],
        "refine_factor": config.refine_factor or point["refine_factor"],
        "bytes_mapped": sum(entry.bytes for entry in index.files),
    }


def work(config: Search) -> Results:
    require_suffix(config.output)
    index, queries = open_artifact(config.index_dir, "index"), open_artifact(config.queries, "embeddings")
    answers = Searcher.of(index).search_embeddings(queries, config.k, config.nprobe, config.refine_factor)
    write_answers(answers, config.output)
    return {"index": index.digest, "queries": len(answers.ids), "k": config.k, "output": str(config.output)}


def run(argv: Sequence[str] | None = None) -> int:
    return main(Search, plan, work, argv)


if __name__ == "__main__":
    sys.exit(run())
