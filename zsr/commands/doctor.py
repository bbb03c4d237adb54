"""Check every node of a cluster and say what to fix: exit code 0 if all checks pass, otherwise 2.

    zsr doctor                    # inside a cluster, or through python -m cluster.submit doctor

Compared over nodes: versions, extras, the GPUs that Ray and torch see, free disk and clocks. Measured: the bandwidth of
an all-reduce (NCCL over GPUs, otherwise gloo) and of transfers between object stores.
"""

from collections.abc import Sequence
from dataclasses import asdict

from pydantic import Field

from zsr.commands.base import JobConfig, Results, attach, main, wrote
from zsr.errors import ConfigError


class Config(JobConfig):
    """Check every node of the cluster and say what to fix.

    Attributes:
        min_free_gib: min free GiB on the disk of Ray's spilled objects and logs, on every node.
        max_skew: max difference in seconds between a node's clock and the driver's.
        min_all_reduce_gbit: min all-reduce bandwidth in Gbit/s; 0 measures without a check, since links differ.
        min_object_store_gbit: min bandwidth between object stores in Gbit/s; 0 measures without a check.
        megabytes: MiB sent in each measurement.
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
