"""What every job shares: flags and YAML into a frozen pydantic model, exit codes, and the JSON line at the end.

A job is a configuration class, a `plan` (what it would do, as JSON values) and a `work` (do it, return the results).
`python -m jobs.NAME --config FILE.yaml --flag value`: the file fills the flags, the command line wins.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from zsr import cluster
from zsr.errors import ConfigError, ZsrError
from zsr.storage import local_path, located, url_of

Results = dict[str, Any]
PACKAGES: Final = "working_dir_files"  # the folder in which Ray unpacks what is submitted with a job


class JobConfig(BaseModel):
    """Flags of every job.

    Attributes:
        plan: print what would be done (stages, bytes, choices and why) and do nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: bool = False

    @field_validator("*", mode="after")
    @classmethod
    def _located(cls, value: Any) -> Any:
        """Resolve paths where the command was called: workers and other nodes have other working directories.

        A submitted job has a working directory of its own, which is removed with the job: what its package holds may be
        named relative to that, and nothing else.
        """
        lost = isinstance(value, Path) and not url_of(value) and not local_path(value).exists()
        if lost and not value.expanduser().is_absolute() and PACKAGES in Path.cwd().parts:
            raise ValueError(
                "a submitted job runs in a folder that is removed with it; give an absolute path that all nodes share, "
                "or a URL"
            )
        return located(value)


Config = TypeVar("Config", bound=JobConfig)


def main(
    config_type: type[Config] | Callable[[Sequence[str]], type[Config]],
    plan: Callable[[Config], Results],
    work: Callable[[Config], Results],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, call, and return the exit code; the last line on stdout is one JSON object with `exit_code` in it.

    Args:
        config_type: the flags' class, or a function that finds it from the arguments.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.distributed prints hundreds from worker set-up
    results: Results = {}
    try:
        arguments = sys.argv[1:] if argv is None else argv
        flags: type[Config] = config_type if isinstance(config_type, type) else config_type(arguments)
        config: Config = parse(flags, arguments)
        results = plan(config) if config.plan else work(config)
        code = 0
    except BaseException as error:  # the job's boundary: every failure becomes an exit code and one message
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (0, None)):
            raise
        code, message = explain(error)
        print(f"error: {message}", file=sys.stderr)
        results = {**getattr(error, "results", {}), "error": message}
    finally:
        cluster.disconnect()
    print(json.dumps({**results, "exit_code": code}, sort_keys=True, default=str), flush=True)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of `error`, which Ray may have wrapped several times."""
    if isinstance(error, SystemExit):  # tyro has printed what is wrong with the flags
        return 2, "the command line was not understood; see above or --help"
    if (shown := ours(error)) is not None:
        return shown.exit_code, str(shown)
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {error}"


def ours(error: BaseException) -> ZsrError | None:
    """The error of our tree that `error` is or wraps."""
    for cause in causes(error):
        if isinstance(cause, ZsrError):
            # Ray's RayTaskError inherits from the cause's class and puts the remote traceback into str()
            original = getattr(cause, "cause", None)
            return original if isinstance(original, ZsrError) else cause
    return None


def attach(error: BaseException, results: Results) -> None:
    """Let the JSON line that a job ends with after `error` hold `results`, too."""
    setattr(error, "results", results)  # noqa: B010 - any exception, and none declares it


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and everything that it wraps, outermost first: __cause__, Ray's `cause`, Ray Train's worker failures."""
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        for attribute in ("worker_failures", "_worker_failures"):
            failures = getattr(current, attribute, None)
            if isinstance(failures, Mapping):
                pending += list(failures.values())
        for attribute in ("training_failed_error", "controller_failure"):
            pending.append(getattr(current, attribute, None))


def parse(config_type: type[Config], argv: Sequence[str]) -> Config:
    """Flags, with `--config FILE.yaml` expanded in front so that the command line wins.

    Raises:
        ConfigError: the file is missing, not a mapping, or names an unknown key; or a value is refused.
        SystemExit: tyro refused the flags and printed why.
    """
    flags = list(argv)
    if "--config" in flags:
        at = flags.index("--config")
        if at + 1 == len(flags):
            raise ConfigError("--config wants the name of a YAML file")
        path = Path(flags[at + 1])
        del flags[at : at + 2]
        flags = [*file_flags(config_type, path), *flags]
    try:
        return tyro.cli(config_type, args=flags, prog=f"python -m {config_type.__module__}", description=None)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(lines)) from error


def file_flags(config_type: type[BaseModel], path: Path) -> list[str]:
    """The flags that spell the keys of a YAML file."""
    return list(_flatten(config_type, file_values(path), f"--config {path}", prefix=""))


def file_values(path: Path) -> dict[str, Any]:
    """The content of a YAML file of flags.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"--config {path}: found {type(content).__name__}, expected a mapping of flags to values")
    return content or {}


def _flatten(config_type: type[BaseModel], content: Mapping[str, Any], where: str, prefix: str) -> Iterator[str]:
    known = config_type.model_fields
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}; known are {sorted(known)}")
        flag = prefix + name.replace("_", "-")
        nested = known[name].annotation
        if isinstance(value, Mapping) and isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from _flatten(nested, value, where, prefix=f"{flag}.")
        elif isinstance(value, bool):
            head, dot, last = flag.rpartition(".")
            yield f"--{flag}" if value else f"--{head}{dot}no-{last}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))
