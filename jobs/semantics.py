"""Class names to SEMANTICS: one vector a class and kind."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs._job import JobConfig, Results, main
from zsr.artifact import Store, open_artifact
from zsr.data import semantics
from zsr.data.rows import canonical_label
from zsr.errors import ConfigError


class Config(JobConfig):
    """Flags of jobs.semantics.

    Attributes:
        output: ROOT of the SEMANTICS artifact.
        data: DATA whose classes are wanted.
        labels: class names, instead of or beside those of the data.
        kinds: kinds of vectors; several are concatenated in sorted order.
    """

    output: Path
    data: Path | None = None
    labels: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("glove",)

    def classes(self) -> tuple[str, ...]:
        """Names from both flags. Raises ConfigError if there is none."""
        named = {canonical_label(label) for label in self.labels}
        if self.data is not None:
            named |= set(open_artifact(self.data, "data").facts["classes"])
        if not named:
            raise ConfigError("no class names; give --data or --labels")
        return tuple(sorted(named))


def plan(config: Config) -> Results:
    return {"classes": len(config.classes()), "kinds": sorted(config.kinds), "output": str(config.output)}


def work(config: Config) -> Results:
    artifact = semantics.build(config.classes(), config.kinds, Store.at(config.output))
    return {"semantics": artifact.digest, **artifact.facts}


def run(argv: Sequence[str] | None = None) -> int:
    return main(Config, plan, work, argv)


if __name__ == "__main__":
    sys.exit(run())
