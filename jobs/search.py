"""Neighbours of sketches: `python -m jobs.search --index-dir I --queries EMB --output neighbours.json`.

For a file or a folder of pictures, give `--sketch PATH --checkpoint C` instead of `--queries`. For millions of queries,
give a directory: `--output ROOT` becomes an artifact with a shard of answers beside each shard of queries, made by many
workers, and the job goes on where a killed one stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from jobs._job import JobConfig, Results, main
from zsr.artifact import Store, open_artifact
from zsr.embedding.shards import Prices
from zsr.errors import ConfigError
from zsr.index.answers import Answers, Asked, answer, is_file, require_suffix, write_answers
from zsr.index.by_list import require
from zsr.index.offline import predict, search_all
from zsr.index.picture import draw, pictures_in
from zsr.index.search import Searcher
from zsr.index.sketches import embed_files, sketch_files


class Search(JobConfig):
    """Search an index.

    Attributes:
        index_dir: ROOT of the index, or one object in it.
        output: .json or .parquet, one row a neighbour; or, for `queries`, ROOT of a NEIGHBOURS artifact.
        queries: EMB of the queries, from the checkpoint that embedded the gallery.
        sketch: a picture, or a folder of pictures, instead of `queries`; wants `checkpoint`.
        checkpoint: the one that embedded the gallery.
        weights: of the checkpoint's backbone, where its package has none.
        k: neighbours a query.
        nprobe: lists to look into; the published operating point if not given.
        refine_factor: candidates to re-rank, in multiples of k; the published operating point if not given.
        labels: only items of these classes, under any spelling.
        replicas: for a NEIGHBOURS artifact: 0 lets each worker map the whole index; from 1 on its segments lie on the
            nodes, each on so many of them.
        list_ranges: for a NEIGHBOURS artifact: from 1 on the lists are scanned in so many ranges, each by one worker,
            which reads the codes of its range alone: for an index that is larger than the memory.
        num_workers: at most, that map the whole index; as many as there are CPUs if not given.
        cpu_price: of a CPU's hour, in any currency; a NEIGHBOURS artifact's results then name the cost of a million
            queries.
        picture: a PNG that shows the first queries with what was found; wants `data`.
        data: DATA with the pictures of the gallery.
    """

    index_dir: Path
    output: Path
    queries: Path | None = None
    sketch: Path | None = None
    checkpoint: Path | None = None
    weights: Path | None = None
    k: int = Field(default=10, ge=1)
    nprobe: int | None = Field(default=None, ge=1)
    refine_factor: int | None = Field(default=None, ge=1)
    labels: tuple[str, ...] = ()
    replicas: int = Field(default=0, ge=0)
    list_ranges: int = Field(default=0, ge=0)
    num_workers: int | None = Field(default=None, ge=1)
    cpu_price: float = 0.0
    picture: Path | None = None
    data: Path | None = None

    def check(self) -> None:
        """Raise ConfigError for flags that do not go together."""
        if not self.offline:
            require_suffix(self.output)
        if (self.queries is None) == (self.sketch is None):
            raise ConfigError("give either --queries (embeddings) or --sketch (pictures)")
        if self.sketch is not None and self.checkpoint is None:
            raise ConfigError("--sketch wants --checkpoint, the one that embedded the gallery")
        if self.picture is not None and self.data is None:
            raise ConfigError("--picture wants --data, which holds the gallery's pictures")
        if self.offline and (self.queries is None or self.picture is not None):
            raise ConfigError(f"--output {self.output} is a ROOT: it wants --queries, and no --picture")
        if self.replicas and not self.offline:
            raise ConfigError("--replicas is for an --output that is a ROOT, not a file")
        if self.list_ranges and not self.offline:
            raise ConfigError("--list-ranges is for an --output that is a ROOT, not a file")

    @property
    def offline(self) -> bool:
        """Whether the answers become an artifact."""
        return not is_file(self.output)

    @property
    def asked(self) -> Asked:
        return Asked(self.k, self.nprobe, self.refine_factor, self.labels)


def plan(config: Search) -> Results:
    config.check()
    index = open_artifact(config.index_dir, "index")
    if config.list_ranges:
        require(index, config.asked, config.replicas)
    point = index.facts["operating_point"]
    cost: Results = {}
    if config.queries is not None:
        queries = open_artifact(config.queries, "embeddings")
        count = queries.facts["rows"]
        if config.offline and not config.replicas and not config.list_ranges:
            prices = Prices(config.cpu_price)
            cost = {"cost": predict(index, queries, config.asked, workers=config.num_workers, prices=prices)}
    else:
        count = len(sketch_files(config.sketch or Path()))
    return {
        "index": index.digest,
        "queries": count,
        "nprobe": config.nprobe or point["nprobe"],
        "refine_factor": config.refine_factor or point["refine_factor"],
        "bytes_mapped": sum(entry.bytes for entry in index.files),
        **cost,
    }


def from_files(config: Search, searcher: Searcher) -> tuple[Answers, list[bytes | None]]:
    """Answers to sketch files, and the files' bytes."""
    files = sketch_files(config.sketch or Path())
    checkpoint = open_artifact(config.checkpoint or Path(), "checkpoint")
    if checkpoint.digest != searcher.space.checkpoint:
        raise ConfigError(
            f"checkpoint {checkpoint.digest[:12]} did not embed the gallery; "
            f"give {searcher.space.checkpoint[:12]}, which did"
        )
    vectors = embed_files(files, checkpoint, config.weights)
    hits = config.asked.of(searcher, vectors)
    keys = np.array([str(path) for path in files], object)
    return Answers(np.arange(len(files)), keys, np.full(len(files), None), hits), [p.read_bytes() for p in files]


def from_embeddings(config: Search, searcher: Searcher) -> tuple[Answers, list[bytes | None]]:
    """Answers to embeddings, and the queries' pictures where DATA has them."""
    queries = open_artifact(config.queries or Path(), "embeddings")
    answers = answer(searcher, queries, config.asked)
    if config.picture is None:
        return answers, []
    data = open_artifact(config.data or Path(), "data")
    drawn = dict(pictures_in(data, str(queries.facts["modality"]), set(answers.ids.tolist())))
    return answers, [drawn.get(int(identity)) for identity in answers.ids]


def to_artifact(config: Search) -> Results:
    """Answers to embeddings, as NEIGHBOURS."""
    index, queries = open_artifact(config.index_dir, "index"), open_artifact(config.queries or Path(), "embeddings")
    output = Store.at(config.output)
    made, told = search_all(
        index,
        queries,
        config.asked,
        output,
        replicas=config.replicas,
        list_ranges=config.list_ranges,
        workers=config.num_workers,
        prices=Prices(config.cpu_price),
    )
    return {"neighbours": made.digest, "index": index.digest, **made.facts, **told}


def work(config: Search) -> Results:
    config.check()
    if config.offline:
        return to_artifact(config)
    searcher = Searcher.open(config.index_dir)
    answers, queries = (from_files if config.sketch is not None else from_embeddings)(config, searcher)
    write_answers(answers, config.output)
    if config.picture is not None:
        ids = set(answers.hits.ids.ravel().tolist())
        found = dict(pictures_in(open_artifact(config.data or Path(), "data"), "photo", ids))
        draw(answers, found, queries, config.picture)
    index = open_artifact(config.index_dir, "index").digest
    return {"index": index, "queries": len(answers.ids), "k": config.k, "output": str(config.output)}


def run(argv: Sequence[str] | None = None) -> int:
    return main(Search, plan, work, argv)


if __name__ == "__main__":
    sys.exit(run())
