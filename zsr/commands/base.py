"""Shared by all commands: flags and YAML parsed into a frozen pydantic model, exit codes, and the final JSON line.

A command is a configuration class, a `plan` (return what it would do, as JSON values) and a `work` (do it and return
the results). `zsr NAME --config FILE.yaml --flag value`: the file sets flags, the command line overrides them.
"""

import argparse
import difflib
import io
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import date
from pathlib import Path
from typing import Any, Final, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from tyro.extras import SubcommandApp

from zsr.artifact import Artifact, sha256
from zsr.artifact.lock import release_all
from zsr.errors import ConfigError, ZsrError
from zsr.interrupt import WATCH, say
from zsr.storage import local_path, located, read_text, url_of

Results = dict[str, Any]
# Ray Data appends this to the message of every exception that a task raises
RETRY_ADVICE: Final = re.compile(r"\nFailed to [^\n]* attempts \(total backoff .*", re.DOTALL)
FILE_HELP: Final = "--config FILE.yaml: flags from a file, which those of the command line override."
PACKAGES: Final = "working_dir_files"  # the folder in which Ray unpacks the files submitted with a job


class JobConfig(BaseModel):
    """Define the flags of every command.

    Attributes:
        dry_run: print what would be done (stages, bytes, choices and their reasons) and exit without doing it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dry_run: bool = False

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """List required flags first in --help, and what every command has last; inherited ones would come first."""
        shared = JobConfig.__annotations__
        order = sorted(cls.model_fields.items(), key=lambda item: (not item[1].is_required(), item[0] in shared))
        cls.__pydantic_fields__ = dict(order)

    @field_validator("*", mode="after")
    @classmethod
    def _located(cls, value: Any) -> Any:
        """Make paths absolute in the driver: workers and other nodes have other working directories.

        A submitted job has its own working directory, which is removed with the job: only files of its package may be
        given relative to it.
        """
        lost = isinstance(value, Path) and not url_of(value) and not local_path(value).exists()
        if lost and not value.expanduser().is_absolute() and PACKAGES in Path.cwd().parts:
            raise ValueError(
                "a submitted job runs in a folder that is deleted when the job ends; give an absolute path that all "
                "nodes share, or a URL"
            )
        return located(value)


Config = TypeVar("Config", bound=JobConfig)


def main(
    config_type: type[Config] | Callable[[Sequence[str]], type[Config]],
    plan: Callable[[Config], Results],
    work: Callable[[Config], Results],
    argv: Sequence[str],
    program: str,
) -> int:
    """Parse the flags, run the command and return its exit code; the last line on stdout is a JSON object.

    The JSON object always has the key `exit_code`. In a process started as a command, SIGINT, SIGTERM and SIGHUP are
    handled in `zsr.interrupt` instead.

    Args:
        config_type: the configuration class, or a function that returns it for the given arguments.
        argv: the flags.
        program: the command line before the flags, such as `zsr train`.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.distributed prints hundreds from worker set-up
    # only `cluster.connect` may connect: Ray's auto-connect would use a cluster without our workers' environment
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    results: Results = {}
    try:
        flags: type[Config] = config_type if isinstance(config_type, type) else config_type(argv)
        config: Config = parse(flags, argv, program)
        results = plan(config) if config.dry_run else work(config)
        code = 0
    except BaseException as error:  # top level: every failure becomes an exit code and one message
        WATCH.hold()
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (0, None)):
            raise
        code, message = explain(error)
        print(f"error: {message}", file=sys.stderr)
        results = {**getattr(error, "results", {}), "error": message}
    finally:
        if (cluster := sys.modules.get("zsr.cluster")) is not None:  # otherwise Ray was never used
            cluster.disconnect()
        release_all()
    WATCH.finish(json.dumps({**results, "exit_code": code}, sort_keys=True, default=str))
    return code


def made(artifact: Artifact, root: object, **own: Any) -> Results:
    """Results of a command that wrote `artifact` to the store at `root`: the common keys, then the command's `own`."""
    return {"artifact": str(root), "digest": artifact.digest, "kind": artifact.kind, **own}


def wrote(path: object, kind: str, content: bytes | None = None, **own: Any) -> Results:
    """Results of a command that wrote something other than an artifact.

    Args:
        path: the file or directory written; None if nothing was written.
        content: the bytes that the digest is computed from; None for no digest.
    """
    digest = None if content is None else sha256(content)
    return {"artifact": None if path is None else str(path), "digest": digest, "kind": kind, **own}


def overview(program: str, commands: Mapping[str, str], words: Sequence[str]) -> int:
    """Print the list of commands of `program` for --help; reject any other `words`, which name no command.

    Returns:
        The exit code: 0 for help, otherwise 2.
    """
    app = SubcommandApp()
    for name, about in commands.items():
        app.command(name=name)(_listed(about))
    if words[:1] in (["-h"], ["--help"]):
        with suppress(SystemExit):
            app.cli(prog=program, args=["--help"])
        say("")
        return 0
    near = difflib.get_close_matches(words[0], commands, n=1) if words else []
    found = f"found {words[0]!r}" if words else "found none"
    hint = f"; perhaps {near[0]}" if near else ""
    message = f"{program}: expected a command, {found}{hint}; choose from {', '.join(commands)}; see {program} --help"
    return refuse(message)


def refuse(message: str) -> int:
    """End a command that cannot begin: the message, the JSON line, and the exit code of a ConfigError."""
    print(f"error: {message}", file=sys.stderr)
    WATCH.finish(json.dumps({"error": message, "exit_code": ConfigError.exit_code}, sort_keys=True))
    return ConfigError.exit_code


def _listed(about: str) -> Callable[[], None]:
    """A placeholder that tyro lists as a subcommand and never calls."""

    def listed() -> None: ...

    listed.__doc__ = about
    return listed


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message for `error`, which Ray may have wrapped several times."""
    if (shown := ours(error)) is not None:
        return shown.exit_code, RETRY_ADVICE.sub("", str(shown))
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {error}"


def ours(error: BaseException) -> ZsrError | None:
    """The ZsrError that `error` is or wraps; None if there is none."""
    for cause in causes(error):
        if isinstance(cause, ZsrError):
            # Ray's RayTaskError inherits from the cause's class and puts the remote traceback into str()
            original = getattr(cause, "cause", None)
            return original if isinstance(original, ZsrError) else cause
    return None


def attach(error: BaseException, results: Results) -> None:
    """Add `results` to the JSON line that the command prints when it fails with `error`."""
    setattr(error, "results", results)  # noqa: B010 - any exception; no exception class declares it


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and all that it wraps, outermost first: __cause__, Ray's `cause`, Ray Train's worker failures."""
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


def parse(config_type: type[Config], argv: Sequence[str], program: str) -> Config:
    """Parse the flags; those of `--config FILE.yaml` come first, so that the command line overrides them.

    Args:
        program: see `main`.

    Raises:
        ConfigError: the file is missing, not a mapping, or has an unknown key; or a flag or value is invalid.
        SystemExit: for --help, after it was printed.
    """
    flags, path = without_file(argv)
    if path is not None:
        flags = [*file_flags(config_type, path), *flags]
    about = (config_type.__doc__ or "").partition("\n")[0]
    try:
        with _captured(flags) as printed:
            return tyro.cli(config_type, args=flags, prog=program, description=f"{about}\n\n{FILE_HELP}")
    except ValidationError as error:
        raise ConfigError(refusals(error, config_type)) from error
    except BrokenPipeError:
        say("")
        raise SystemExit(0) from None
    except SystemExit as error:
        if not error.code:
            say("")  # flushes the help, which `head` may not have read to its end
            raise
        # tyro prints pydantic's validation errors in its own words
        refused = next((cause for cause in causes(error) if isinstance(cause, ValidationError)), None)
        message = (
            refusals(refused, config_type)
            if refused
            else f"{sentence(printed.getvalue().decode())}; see {program} --help"
        )
        raise ConfigError(message) from error


def refusals(error: ValidationError, config_type: type[BaseModel]) -> str:
    """Format the validation errors of a configuration: flag, value found, reason."""
    return "; ".join(
        _refusal(about["loc"], about["msg"], about["input"], error, config_type) for about in error.errors()
    )


def _refusal(
    place: tuple[int | str, ...], message: str, found: object, error: ValidationError, config_type: type[BaseModel]
) -> str:
    said = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not place:  # a check of several flags together: the message names them
        return said
    parts = [str(part).replace("_", "-") for part in place if not isinstance(part, int)]
    # tyro builds nested models one by one, so an error's location is relative to its own model
    within = next((flag for flag, kind in _models(config_type) if _is_of(error, str(place[0]), kind)), "")
    return f"--{within}{'.'.join(parts)}: found {found!r}; {said[:1].lower()}{said[1:]}"


def _is_of(error: ValidationError, field: str, kind: type[BaseModel]) -> bool:
    return error.title == kind.__name__ and field in kind.model_fields


def _models(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield a model and those nested in it, each with the prefix of its flags."""
    yield prefix, kind
    for name, about in kind.model_fields.items():
        if isinstance(about.annotation, type) and issubclass(about.annotation, BaseModel):
            yield from _models(about.annotation, f"{prefix}{name.replace('_', '-')}.")


@contextmanager
def _captured(flags: Sequence[str]) -> Iterator[io.BytesIO]:
    """Capture tyro's error output without line wrapping; --help is printed unchanged."""
    printed = io.BytesIO()
    if {"-h", "--help"} & set(flags):
        yield printed
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    # tyro chooses its box characters by the encoding of stdout
    text = io.TextIOWrapper(printed, encoding="utf-8", write_through=True)
    try:
        with redirect_stdout(text), redirect_stderr(text):
            yield printed
    finally:
        text.detach()
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def sentence(box: str) -> str:
    """The content of tyro's error box as one line, without its title and the help of the flags it names."""
    found = ""
    lines = iter(box.splitlines())
    for line in lines:
        text = line.strip("│ ")
        indent = len(line) - len(line.lstrip("│ "))
        if not text or text[0] in "╭╰":
            continue
        if text.startswith("For full helptext"):
            break
        if text.startswith("Argument helptext"):
            found += f"expected {next(lines).strip('│ ')}"
            break
        if text[0] == "─":
            found += "; "
        elif indent < 8:  # deeper is help
            found += f"{'' if not found or found[-2:] == '; ' else ' ' if found[-1] == ':' else ', '}{text}"
    found = re.sub(r"Missing from [^:]*:", "missing", found).removesuffix("; ").removesuffix(".")
    found = re.sub(r"(invalid literal for int\(\) with base 10|could not convert string to float):", "found", found)
    found = (
        found.replace("Error parsing ", "").replace("Unrecognized options:", "unknown").replace("Perhaps", "perhaps")
    )
    return found.replace("invalid choice", "found").strip()


def without_file(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """The flags without `--config FILE` or `--config=FILE`, and that file.

    Raises:
        ConfigError: --config has no value.
    """
    found, flags = _read(argv, "config")
    if found["config"] == "":
        raise ConfigError("--config requires the name of a YAML file")
    return flags, None if found["config"] is None else Path(found["config"])


def peek(argv: Sequence[str], *names: str) -> dict[str, str | None]:
    """The values of flags that determine which other flags exist; None for a flag that is not given."""
    return _read(argv, *names)[0]


def _read(argv: Sequence[str], *names: str) -> tuple[dict[str, str | None], list[str]]:
    """The values of the flags `names`, "" for a flag without a value, and all remaining words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?", const="")
    found, others = parser.parse_known_args(argv)
    return {name: getattr(found, name) for name in names}, others


def file_flags(config_type: type[BaseModel], path: Path) -> list[str]:
    """The keys of a YAML file as command-line flags."""
    return list(_flatten(config_type, file_values(path), f"--config {path}", prefix=""))


def file_values(path: Path, flag: str = "--config") -> dict[str, Any]:
    """The content of a YAML file of flags.

    Args:
        flag: the flag that named the file, for messages.

    Raises:
        ConfigError: missing, not text, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(read_text(path, flag))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{flag} {path}: {' '.join(str(error).split())}; expected YAML") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{flag} {path}: found {type(content).__name__}, expected a mapping of flags to values")
    return content or {}


def _flatten(config_type: type[BaseModel], content: Mapping[str, Any], where: str, prefix: str) -> Iterator[str]:
    known = config_type.model_fields
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}; known are {sorted(known)}")
        flag = prefix + name.replace("_", "-")
        kind = known[name].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _flatten(kind, _section(value, flag, where), where, prefix=f"{flag}.")
        elif kind is bool and isinstance(value, bool):
            head, dot, last = flag.rpartition(".")
            yield f"--{flag}" if value else f"--{head}{dot}no-{last}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *(_word(item, flag, where) for item in value))
        elif value is not None:  # null means the default: flags that may be None default to None
            yield from (f"--{flag}", str(value) if isinstance(value, bool) else _word(value, flag, where))


def _section(value: object, flag: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        found = "nothing" if value is None else f"{type(value).__name__} {value!r}"
        raise ConfigError(
            f"{where}: {flag}: found {found}, expected a mapping of its flags; leave the key out for none"
        )
    return value


def _word(value: object, flag: str, where: str) -> str:
    """A value as written on the command line. Raises ConfigError if it is not a string, number or date."""
    if isinstance(value, str | int | float | date) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(
        f"{where}: {flag}: found {value!r}, expected a string or number; YAML reads an unquoted yes, no, on, off or "
        "null as something else, so put strings in quotes"
    )
