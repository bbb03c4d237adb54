"""Every error that zsr raises on purpose, and the exit code that a job ends with.

    ZsrError                        1   unexpected, or not sorted into one of the kinds below
    |-- ConfigError                 2   bad or unknown configuration
    |   |-- Infeasible              2   a budget or target that cannot be met (names the nearest that can)
    |   `-- Leakage                 2   an unseen class where only seen ones may be
    |-- TooManyBadRows              3   more rows quarantined than --max-bad-rows allows
    |-- QualityGateFailed           4   built, but below the target: not published
    |-- DamagedArtifact             5   size, digest or schema is not what the manifest promises
    |-- NonFiniteLoss               6   a loss term is NaN or infinite
    |-- StorageError                7   a storage that fails or lacks what publishing needs
    |   `-- DiskFull                7   no space left
    |-- AlreadyPublished            8   another publisher took the version first
    `-- Interrupted               143   a submitted job got SIGTERM (128 + 15)

A command that gets a signal itself ends with 128 + its number: 130 for Ctrl-C, 143 for SIGTERM (see zsr.interrupt).

A message says which artifact or row, what was found, what was expected and what to do.
"""

from typing import ClassVar


class ZsrError(Exception):
    """Base of the tree; `exit_code` is what a job returns when one escapes."""

    exit_code: ClassVar[int] = 1


class ConfigError(ZsrError):
    """The configuration is wrong: nothing was run."""

    exit_code = 2


class Infeasible(ConfigError):
    """A budget or target cannot be met; the message names the nearest feasible values."""


class Leakage(ConfigError):
    """An unseen class would reach training, or a trained class would count as unseen."""


class TooManyBadRows(ZsrError):
    """More rows were quarantined than the user allowed."""

    exit_code = 3


class QualityGateFailed(ZsrError):
    """The result was built but misses its target, so it was not published."""

    exit_code = 4


class DamagedArtifact(ZsrError):
    """Bytes on disk are not those that the manifest describes."""

    exit_code = 5


class NonFiniteLoss(ZsrError):
    """A loss term became NaN or infinite; the message names the term and the step."""

    exit_code = 6


class StorageError(ZsrError):
    """The storage failed, or cannot do what publishing needs."""

    exit_code = 7


class DiskFull(StorageError):
    """No space is left; what was committed before is untouched."""


class AlreadyPublished(ZsrError):
    """Another publisher created this version first."""

    exit_code = 8


class Interrupted(ZsrError):
    """A submitted job was stopped, or its node told it to end; the same command continues it."""

    exit_code = 143
