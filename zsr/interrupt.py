"""End a command within seconds of SIGINT, SIGTERM or SIGHUP, with one line and one exit code, at any time.

Python signal handlers run between two instructions of the main thread, so not while faiss trains, and Ray and Ray Train
replace them with their own. The interpreter's C handler also writes to a wakeup descriptor, which a thread reads here.
The thread does not unwind the stack, since all persistent state is safe against a kill at any time. It kills child
processes, removes what would outlive this process, prints how to continue, and exits.
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
KILLING: Final = 1.5  # max seconds to kill all children
LIMIT: Final = 2.5  # max seconds from the signal to the exit, even if something hangs
_SUBREAPER: Final = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
_SHOW_CURSOR: Final = "\x1b[?25h\n"  # a progress bar hides it


class Watch:
    """Signal handling of this process.

    Attributes:
        advice: how to continue; by default the message names the staging area, if there is one.
        staging: path or URL of the staging area, which holds finished pieces.
    """

    def __init__(self) -> None:
        self.advice = ""
        self.staging = ""
        self._cleanups: list[Callable[[], object]] = []
        self._lock = threading.Lock()  # held while the JSON line is printed
        self._stopping = False
        self._finished = False
        self._out, self._err = 1, 2
        self._caught: tuple[signal.Signals, ...] = ()

    def start(self) -> None:
        """Start handling signals. Signals that the parent process ignores, as with nohup, stay ignored.

        Safe to call again. Does nothing outside of the main thread, in which Python cannot handle signals.
        """
        if self._caught or threading.current_thread() is not threading.main_thread():
            return
        self._caught = tuple(number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
        self._out, self._err = os.dup(1), os.dup(2)  # whatever is sent elsewhere later
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self.install()
        threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=self._forked)

    def install(self) -> None:
        """Make the main thread wait for the exit on a signal; call again after Ray has installed its own handlers."""
        for number in self._caught:
            signal.signal(number, _wait)

    def at_end(self, cleanup: Callable[[], object]) -> None:
        """Register a function to call after the children are killed, to remove what would outlive the process."""
        self._cleanups.append(cleanup)

    def finish(self, line: str) -> None:
        """Print a command's last line. Signals are ignored from here on; if one has come already, never returns."""
        for number in self._caught:
            signal.signal(number, signal.SIG_IGN)
        with self._lock:
            if not self._stopping:
                self._finished = True
                say(f"{line}\n")
                return
        _wait()

    def hold(self) -> None:
        """Never return if a signal has come: errors in the main thread are then consequences of killed children."""
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
        out, err = self._out, self._err
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
        for descriptor in (1, 2):  # from here on only `leave` prints
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
        """Reset signal handling in a fork: it shares the pipe, so that its signals would end its parent."""
        if signal.set_wakeup_fd(-1) == -1:
            return
        for number in self._caught:
            signal.signal(number, signal.SIG_DFL)


def say(text: str) -> None:
    """Print `text` and flush. A closed stdout, such as that of `| head`, is not an error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's flush at exit


def _wait(*_: object) -> NoReturn:
    while True:
        time.sleep(60)


def _kill_children() -> None:
    """Kill all descendants of this process. As a subreaper it adopts orphans, which the next iteration finds."""
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
    """Start signal handling if this process runs `python -m`; for the __init__ of a package of commands.

    This is before the command's own imports, which take seconds. The first argument is "-m" only while `python -m`
    looks for the module: other importers of the package keep their signal handling.
    """
    if sys.argv[:1] == ["-m"]:
        WATCH.start()
