"""Submit a job to a cluster, follow it, and end with its exit code.

    python -m cluster.submit pipeline -- --config pipeline.yaml
    python -m cluster.submit train --no-wait -- --data /shared/data ... --output /shared/checkpoint

What stands after `--` are the flags of `zsr NAME`. Its log goes to stderr; the last line on stdout is the job's own
JSON line. A job that was killed, or whose node was lost, goes on where it was when the same command is given again;
while it runs, the same command follows it and does not start it twice.
"""

import asyncio
import hashlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import tyro
from pydantic import Field
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import zsr.errors
from cluster.package import LIMIT, Package, package
from zsr.artifact import canonical, sha256
from zsr.cli import COMMANDS
from zsr.commands.base import JobConfig, Results, attach, main, without_file
from zsr.errors import ConfigError, Interrupted, ZsrError
from zsr.interrupt import WATCH

ROOT: Final = Path(__file__).resolve().parents[1]
JOBS: Final = tuple(sorted(COMMANDS))
BY_EXIT_CODE: Final[Mapping[int, type[ZsrError]]] = {
    kind.exit_code: kind
    for kind in vars(zsr.errors).values()
    if isinstance(kind, type) and issubclass(kind, ZsrError) and ZsrError in (kind, *kind.__bases__)
}
STARTING: Final = 60  # seconds that a head may take until its job agent answers


class Config(JobConfig):
    """Flags of cluster.submit; those of the job follow after --.

    Attributes:
        job: which command of zsr.
        address: of the dashboard; by default RAY_API_SERVER_ADDRESS.
        wait: follow the job to its end; --no-wait returns when it is submitted.
        entrypoint_num_cpus: what the job's driver reserves; with 0 it runs on the head.
        spot_driver: allow the driver on a spot machine, whose loss ends the job.
        retries: how often a job whose driver was lost is submitted again; an error of the job itself is final.
        metadata: NAME=VALUE, shown beside the job in the dashboard.
        python: the interpreter on the nodes.
    """

    job: Annotated[str, tyro.conf.Positional]
    address: str = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    wait: bool = True
    entrypoint_num_cpus: float = Field(1, ge=0)
    spot_driver: bool = False
    retries: int = Field(0, ge=0)
    metadata: tuple[str, ...] = ()
    python: str = "python"


@dataclass(frozen=True)
class Submission:
    """One job, packed and ready to go."""

    config: Config
    flags: tuple[str, ...]
    package: Package

    @classmethod
    def of(cls, config: Config, flags: Sequence[str]) -> "Submission":
        """Pack the source tree and the configuration file.

        Raises:
            ConfigError: no such job, a package that is too large, a file that cannot be read.
        """
        if config.job not in JOBS:
            raise ConfigError(f"no job {config.job!r}; there are {list(JOBS)}")
        words, files = carried(flags)
        return cls(config, words, package(ROOT, files))

    @property
    def entrypoint(self) -> str:
        return " ".join([self.config.python, "-m", f"jobs.{self.config.job}", *map(shlex.quote, self.flags)])

    @property
    def name(self) -> str:
        """Equal for equal jobs and flags: attempts at the same work are NAME-1, NAME-2, ..."""
        about = {"job": self.config.job, "flags": list(self.flags)}
        return f"{self.config.job}-{sha256(canonical(about))[:10]}"

    def metadata(self) -> dict[str, str]:
        """What the dashboard shows. Raises ConfigError for what is not NAME=VALUE."""
        pairs = [word.partition("=") for word in self.config.metadata]
        if wrong := [word for word, (name, _, _) in zip(self.config.metadata, pairs, strict=True) if not name]:
            raise ConfigError(f"--metadata {wrong[0]!r}: expected NAME=VALUE")
        source = hashlib.sha256(self.package.data).hexdigest()
        return {**{name: value for name, _, value in pairs}, "job": self.config.job, "source": source[:16]}

    def as_json(self) -> Results:
        """What a submission would do."""
        return {
            "entrypoint": self.entrypoint,
            "name": self.name,
            "address": self.config.address,
            "package_bytes": len(self.package.data),
            "package_limit": LIMIT,
            "package": dict(self.package.contents),
            "metadata": self.metadata(),
        }


def carried(flags: Sequence[str]) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """The flags with `--config FILE` as the nodes see it, and that file, which travels in the package.

    Raises:
        ConfigError: the file cannot be read.
    """
    words, path = without_file(flags)
    if path is None:
        return tuple(words), {}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    name = f"submitted/{sha256(data)[:16]}.yaml"  # by content: another content is another job
    # behind the first word, which may be a command of `zsr index`, and in front of the flags that override it
    at = 1 if words and not words[0].startswith("-") else 0
    return (*words[:at], "--config", name, *words[at:]), {name: data}


class Cluster:
    """The jobs of one cluster.

    Raises:
        ZsrError: it does not answer, or refuses the token.
    """

    def __init__(self, address: str) -> None:
        try:
            self.client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise ZsrError(
                f"{address}: {error}; is the tunnel to the dashboard up, and are RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH "
                "those of the cluster?"
            ) from error

    def attempts(self, name: str) -> list[JobDetails]:
        """Earlier submissions of the same work, oldest first."""
        found = [job for job in self.client.list_jobs() if (job.submission_id or "").startswith(f"{name}-")]
        return sorted(found, key=lambda job: int(str(job.submission_id).rpartition("-")[2]))

    def start(self, work: Submission) -> tuple[str, bool]:
        """The id of the running attempt at this work, which is started unless there is one; and whether it was."""
        before = self.attempts(work.name)
        if before and not before[-1].status.is_terminal():
            return str(before[-1].submission_id), False
        number = int(str(before[-1].submission_id).rpartition("-")[2]) + 1 if before else 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "package.zip"
            path.write_bytes(work.package.data)
            return self._submit(work, f"{work.name}-{number}", path), True

    def _submit(self, work: Submission, identity: str, path: Path) -> str:
        reserve = work.config.entrypoint_num_cpus
        spot = {} if work.config.spot_driver or not reserve else {"ray.io/market-type": "!spot"}
        deadline = time.monotonic() + STARTING
        while True:
            try:
                return self.client.submit_job(
                    entrypoint=work.entrypoint,
                    submission_id=identity,
                    runtime_env={"working_dir": str(path)},
                    metadata=work.metadata(),
                    entrypoint_num_cpus=reserve or None,
                    entrypoint_label_selector=spot or None,
                )
            except RuntimeError as error:
                # a head that has just started has no agent to run jobs yet
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ZsrError(f"{work.config.address} refused the job: {error}") from error
                time.sleep(1)

    def follow(self, identity: str) -> Results | None:
        """Pass the job's log on until it has ended; its JSON line, or None if its driver was lost or got a signal.

        Raises:
            Interrupted: it was stopped.
        """
        log = Log()
        while True:
            asyncio.run(self._tail(identity, log))
            status = self.client.get_job_status(identity)
            if status.is_terminal():
                break
            time.sleep(1)
        if status == JobStatus.STOPPED:
            raise Interrupted(f"job {identity} was stopped; run the same command again to continue")
        results = log.results()
        return results if results is None or results["exit_code"] < 128 else None

    async def _tail(self, identity: str, log: "Log") -> None:
        log.seen = 0
        try:
            async for text in self.client.tail_job_logs(identity):
                log.add(text)
        except (RuntimeError, OSError) as error:  # the connection, or the node of the driver
            print(f"log of {identity}: {error}", file=sys.stderr)


class Log:
    """What a job has printed; passed on to stderr once, however often it is read from its beginning.

    Attributes:
        seen: characters of the present reading.
    """

    KEPT: Final = 1 << 20  # characters of the end, where the JSON line is

    def __init__(self) -> None:
        self.seen = self.shown = 0
        self.end = ""

    def add(self, text: str) -> None:
        """The next part of the present reading."""
        before, self.seen = self.seen, self.seen + len(text)
        fresh = text[max(0, self.shown - before) :]
        if fresh:
            self.shown = self.seen
            self.end = (self.end + fresh)[-self.KEPT :]
            sys.stderr.write(fresh)
            sys.stderr.flush()

    def results(self) -> Results | None:
        """The last line that is a job's JSON line."""
        for line in reversed(self.end.splitlines()):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "exit_code" in found:
                return found
        return None


def plan(work: Submission) -> Results:
    """What would be submitted; nothing is, and no cluster is asked."""
    return work.as_json()


def submit(work: Submission) -> Results:
    """Submit, and follow to the end if asked to.

    Raises:
        ZsrError: of the kind that has the job's exit code.
    """
    cluster = Cluster(work.config.address)
    for left in range(work.config.retries, -1, -1):
        identity, started = cluster.start(work)
        print(f"{identity}: {'submitted' if started else 'runs already; following it'}", file=sys.stderr, flush=True)
        if not work.config.wait:
            return {"submission_id": identity, "started": started}
        WATCH.advice = f"job {identity} runs on; the same command follows it, and `ray job stop {identity}` ends it"
        results = cluster.follow(identity)
        if results is not None:
            return ended(identity, results)
        print(f"{identity}: its driver was lost; {left} retries left", file=sys.stderr, flush=True)
    raise ZsrError(f"{identity}: the driver was lost; run the same command again to continue, or give --retries")


def ended(identity: str, results: Results) -> Results:
    """The results of a job that succeeded.

    Raises:
        ZsrError: of the kind that has its exit code, if that is not 0; the other results go with it.
    """
    results = {**results, "submission_id": identity}
    code, message = results.pop("exit_code"), results.pop("error", "")
    if code == 0:
        return results
    error = BY_EXIT_CODE.get(code, ZsrError)(message)
    attach(error, results)
    raise error


def run(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    flags = words[at + 1 :]
    return main(
        Config,
        lambda config: plan(Submission.of(config, flags)),
        lambda config: submit(Submission.of(config, flags)),
        words[:at],
        "python -m cluster.submit",
    )


if __name__ == "__main__":
    sys.exit(run())
