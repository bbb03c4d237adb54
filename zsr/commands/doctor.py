"""Looks at every node of a cluster and says what to fix: exit 0 when nothing is, 2 when something must be.

    zsr doctor                    # inside of a cluster, or through python -m cluster.submit doctor

Compared over nodes: versions, extras, the GPUs that Ray and torch see, free disk and clocks. Measured: the bandwidth of
an all-reduce (NCCL over GPUs, gloo without) and of an object on its way between two object stores.
"""

from collections.abc import Sequence
from dataclasses import asdict

from pydantic import Field

from zsr.commands.base import JobConfig, Results, attach, main, wrote
from zsr.errors import ConfigError


class Config(JobConfig):
    """Flags of zsr doctor.

    Attributes:
        min_free_gib: disk that must be free where Ray spills and logs, on every node.
        max_skew: seconds that a node's clock may differ from the driver's.
        min_all_reduce_gbit: a second; slower is a finding. 0 measures without judging, since links differ.
        min_object_store_gbit: likewise, between object stores.
        megabytes: size of what is sent in both measurements.
    """

    min_free_gib: float = Field(10.0, ge=0)
    max_skew: float = Field(1.0, gt=0)
    min_all_reduce_gbit: float = Field(0.0, ge=0)
    min_object_store_gbit: float = Field(0.0, ge=0)
    megabytes: int = Field(32, ge=1)


def plan(config: Config) -> Results:
    from zsr.commands import checks

    return {"checks": [check.__name__ for check in checks.ALL]}


def work(config: Config) -> Results:
    from zsr.commands import checks

    found = checks.examine(config)
    checks.show(found)
    wrong = [check for check in found if check.fix]
    results = wrote(None, "checks", checks=[asdict(check) for check in found])
    if wrong:
        error = ConfigError("; ".join(f"{check.what}: {check.found}: {check.fix}" for check in wrong))
        attach(error, results)
        raise error
    return results


def run(argv: Sequence[str]) -> int:
    return main(Config, plan, work, argv, "zsr doctor")
