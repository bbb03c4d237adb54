"""End a command within seconds of SIGINT, SIGTERM or SIGHUP, with one line and one exit code, whatever it is doing.

A handler of Python's runs between two instructions of the main thread: not while faiss trains, and Ray and Ray Train
replace it by their own. The interpreter's C handler also writes to a wakeup descriptor, which a thread reads here. The
thread unwinds nothing, since everything that a job keeps is safe from a kill at any moment. It kills what this process
has started, removes what would outlive it, says how to continue, and exits.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import psutil

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; Kubernetes and Slurm; a closed terminal
KILLING: Final = 1.5  # seconds in which children must be gone
LIMIT: Final = 2.5  # seconds from the signal to the exit, if something hangs on the way
_SUBREAPER: Final = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
_SHOW_CURSOR: Final = "\x1b[?25h\n"  # a progress bar hides it


class Watch:
    """The signals of this process, and what is to be done when one comes.

    Attributes:
        advice: how to continue; by default it names the staging area, if there is one.
        staging: where finished pieces are kept.
    """

    def __init__(self) -> None:
        self.advice = ""
        self.staging = ""
        self._cleanups: list[Callable[[], object]] = []
        self._lock = threading.Lock()  # held by whoever prints the JSON line
        self._stopping = False
        self._finished = False
        self._caught: tuple[signal.Signals, ...] = ()

    def start(self) -> None:
        """Watch the signals from now on. One that the parent process ignores, as nohup does, stays ignored.

        Safe to call again. Does nothing outside of the main thread, where Python handles no signals.
        """
        if self._caught or threading.current_thread() is not threading.main_thread():
            return
        self._caught = tuple(number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self.install()
        threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=self._forked)

    def install(self) -> None:
        """Have the main thread wait for the end when a signal comes; again after Ray has put its own handler there."""
        for number in self._caught:
            signal.signal(number, _wait)

    def at_end(self, cleanup: Callable[[], object]) -> None:
        """Call `cleanup` after the children have been killed: for what outlives the process."""
        self._cleanups.append(cleanup)

    def finish(self, line: str) -> None:
        """Print a command's last line. Signals are ignored from here on; after one, this never returns."""
        for number in self._caught:
            signal.signal(number, signal.SIG_IGN)
        with self._lock:
            if not self._stopping:
                self._finished = True
                say(f"{line}\n")
                return
        _wait()

    def hold(self) -> None:
        """Never return once a signal has come: what the main thread sees from there on are results of the kill."""
        if self._stopping:
            _wait()

    def message(self) -> str:
        """How to continue."""
        if self.advice:
            return f"interrupted; {self.advice}"
        again = "run the same command again to continue"
        if self.staging and ("://" in self.staging or Path(self.staging).exists()):
            return f"interrupted; {again}: finished pieces are kept in {self.staging}"
        return f"interrupted; {again}"

    def _read(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 64):
                if number in self._caught:
                    self._stop(number)

    def _stop(self, number: int) -> None:
        code = 128 + number
        out, err = os.dup(1), os.dup(2)
        with self._lock:
            if self._finished:
                return
            self._stopping = True
        message = self.message()
        json_line = json.dumps({"error": message, "exit_code": code}, sort_keys=True)

        def leave() -> NoReturn:
            line = f"{_SHOW_CURSOR if os.isatty(err) else ''}{message}\n"
            for descriptor, text in ((err, line), (out, f"{json_line}\n")):
                with suppress(OSError):  # a terminal that was closed
                    os.write(descriptor, text.encode())
            os._exit(code)

        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # from here on only `leave` has something to say
            os.dup2(null, descriptor)
        limit = threading.Timer(LIMIT, leave)
        limit.daemon = True
        limit.start()
        _kill_children()
        for cleanup in self._cleanups:
            with suppress(Exception):
                cleanup()
        limit.cancel()
        leave()

    def _forked(self) -> None:
        """A fork shares the pipe: its signals would end its parent."""
        if signal.set_wakeup_fd(-1) == -1:
            return
        for number in self._caught:
            signal.signal(number, signal.SIG_DFL)


def say(text: str) -> None:
    """Print `text` at once. A reader of stdout that has left before the end, such as `head`, is no error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes when it ends


def _wait(*_: object) -> NoReturn:
    while True:
        time.sleep(60)


def _kill_children() -> None:
    """Kill everything below this process. Orphans become its own, and are found in the next look."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    deadline = time.monotonic() + KILLING
    while time.monotonic() < deadline:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            return
        time.sleep(0.02)


WATCH: Final = Watch()


def watch_command() -> None:
    """Watch the signals of this process if it runs `python -m`; for the __init__ of a package of commands.

    That is before the command's own imports, which take seconds. While `python -m` looks for a module, and only then,
    the first argument is "-m": whoever else imports the package keeps its signals.
    """
    if sys.argv[:1] == ["-m"]:
        WATCH.start()
