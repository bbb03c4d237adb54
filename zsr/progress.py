"""Show the progress of a stage: a bar on a terminal, otherwise a line every 30 s; at its end a line with rows and rate.

    with stage("tune", total=1000, unit="queries"):
        ...
        advance(len(batch))  # where the rows are processed, in this process or in a Ray task of the stage

Tasks report their counts through the cluster, see `telemetry.Items`.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Final, TypeVar

QUIET: Final = 30.0  # seconds between two lines without a terminal
LOOK: Final = 5.0  # seconds between two readings of the counts without a terminal, more often than lines for the rate
REFRESH: Final = 1.0  # seconds between two readings on a terminal, and between two reports of a task
WINDOW: Final = 60.0  # seconds over which the rate is averaged, so that worker start-up is soon excluded

T = TypeVar("T")

_sink: Callable[[int], None] | None = None  # receives the counts of `advance`: the running stage, or a task's report


def advance(count: int = 1) -> None:
    """Count rows (or whatever the unit of the running stage is) as done. Does nothing outside of a stage."""
    if _sink is not None:
        _sink(count)


def counted(parts: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
    """Yield (number of rows, part) pairs unchanged, and count the rows of each as done."""
    for count, part in parts:
        advance(count)
        yield count, part


def say(line: str) -> None:
    """Print a line to stderr, above the progress bar if there is one."""
    print(line, file=sys.stderr, flush=True)


def found_finished(what: str, found: int, total: int, unit: str = "shards", *, reused: int = 0) -> None:
    """Print how much of a stage is finished already; prints nothing if nothing is.

    Args:
        found: items that an earlier, interrupted run finished.
        reused: items reused from the last version.
    """
    if not found and not reused:
        return
    parts = [f"{found:,} of {total:,} {unit} found finished"] if found else []
    parts += [f"{reused:,} of {total:,} {unit} reused from the last version"] if reused else []
    say(f"{what}: {', '.join(parts)}, {total - found - reused:,} to compute")


def up_to_date(what: str, where: object, versions: Sequence[int]) -> None:
    """Print that an identical run already wrote the result, as the last of `versions`."""
    say(f"{what}: nothing to do: version {versions[-1]} of {where} is up to date")


class Stage:
    """Progress display of one stage.

    Attributes:
        what: its name.
        total: total number of rows; None if unknown.
        unit: unit of the counts; empty to show only the time.
        done: rows done.
        note: additional text, such as the current loss.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, done: int = 0, poll: Callable[[], int] | None = None
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self.note = done, ""
        self.terminal = sys.stderr.isatty()
        self._poll, self._first = poll, done
        self._began = self._printed = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque([(self._began, done)])
        self._over = threading.Event()
        self._bar: Any = None

    def advance(self, count: int) -> None:
        """Count rows of this process as done."""
        self.done += count

    def look(self) -> None:
        """Update the display."""
        if self._poll is not None:
            self.done = max(self.done, self._poll())
        now = time.monotonic()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW:
            self._seen.popleft()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, said=self.sentence())
        elif now - self._printed >= QUIET:
            self._printed = now
            say(f"{self.what}: {self.sentence()}")

    @property
    def rate(self) -> float:
        """Rows per second over the last `WINDOW` seconds."""
        (since, before), (now, done) = self._seen[0], self._seen[-1]
        return (done - before) / (now - since) if now > since else 0.0

    def sentence(self) -> str:
        """Progress, rate and remaining time, as text."""
        rate, total = self.rate, self.total
        of = "" if total is None else f" of {total:,}"
        said = [f"{self.done:,}{of} {self.unit}"] if self.unit else []
        said += [self.note] if self.note else []
        if rate > 0:
            said.append(f"{_number(rate)} {self.unit}/s")
            if total is not None and total > self.done:
                said.append(f"{duration((total - self.done) / rate)} left")
        else:
            said.append(f"{duration(time.monotonic() - self._began)} so far")
        return ", ".join(said)

    def summary(self) -> str:
        """The line at the end."""
        seconds = time.monotonic() - self._began
        done = self.done - self._first
        said = [f"{done:,} {self.unit} in {duration(seconds)}" if self.unit else duration(seconds)]
        said += [f"{_number(done / max(seconds, 1e-9))} {self.unit}/s"] if done else []
        return ", ".join([*said, *([self.note] if self.note else [])])

    @contextmanager
    def shown(self) -> Iterator["Stage"]:
        """Refresh the display while the body runs; print the final line if it succeeds."""
        with self._screen():
            thread = threading.Thread(target=self._watch, name="zsr-progress", daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._over.set()
                thread.join()
        say(f"{self.what}: {self.summary()}")

    def _watch(self) -> None:
        while not self._over.wait(REFRESH if self.terminal else LOOK):
            # a display error must not fail the stage: the counts may be unavailable for a while, as after a lost head
            with suppress(Exception):
                self.look()

    @contextmanager
    def _screen(self) -> Iterator[None]:
        """Show a bar on a terminal, which is removed at the end."""
        if not self.terminal:
            yield
            return
        from rich.console import Console  # imported here: only needed on a terminal
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}"),
        )
        # stdout is not redirected: the command's JSON line may go to a file
        bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True)
        with bar:
            bar.add_task(self.what, total=self.total, completed=self.done, said="")
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None


@contextmanager
def stage(
    what: str, total: int | None = None, unit: str = "rows", *, done: int = 0, poll: Callable[[], int] | None = None
) -> Iterator[Stage]:
    """Show a stage while the body runs. A stage within another stage is not shown.

    Args:
        what, total, unit: see `Stage`.
        done: rows done before.
        poll: returns the number of rows done, for rows processed by other processes; called from another thread. Counts
            of `advance` in this process are then ignored.
    """
    shown = Stage(what, total, unit, done, poll)
    with shown.shown() if _sink is None else nullcontext(), counting(shown.advance if poll is None else ignore):
        yield shown


def ignore(count: int) -> None:
    """Do nothing; a sink that discards counts."""


@contextmanager
def counting(sink: Callable[[int], None]) -> Iterator[None]:
    """Send the counts of `advance` to `sink` while the body runs."""
    global _sink
    outer, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = outer


def duration(seconds: float) -> str:
    """Format a duration.

    >>> duration(3.21), duration(200), duration(7500)
    ('3.2 s', '3 min 20 s', '2 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
