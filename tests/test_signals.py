"""A signal ends a command within seconds, whatever it does: one line, 128 + the signal, and nothing left running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 3.0  # seconds from the signal to the end

# a command whose main thread is in C and sees no signal: k-means over many vectors
IN_C = """
import faiss, numpy
faiss.omp_set_num_threads(1)
vectors = numpy.random.default_rng(0).random((200_000, 128), dtype=numpy.float32)
print("working", flush=True)
faiss.Kmeans(128, 4096, niter=1000, max_points_per_centroid=1000).train(vectors)
"""
# one that starts a local Ray, and whose task tells that it runs
IN_RAY = """
import time
from zsr import executor
def work(piece):
    open(piece["path"], "w").close()
    time.sleep(600)
    return piece
executor.map_pieces("work", work, [{"path": PATH}])
"""
# one that would swallow whatever a handler raises
IN_PYTHON = """
print("working", flush=True)
while True:
    try:
        sum(range(1000))
    except BaseException:
        pass
"""


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    seconds: float
    out: list[str]
    err: list[str]
    alive: list[int]


def command(tmp_path: Path, body: str) -> list[str]:
    """A command of its own package that is started as ours are, and runs `body` as its job."""
    package = tmp_path / "commands"
    package.mkdir()
    (package / "__init__.py").write_text("from zsr.interrupt import watch_command\nwatch_command()\n")
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    (package / "job.py").write_text(
        "from zsr.commands.base import JobConfig, main\n\n"
        "class Config(JobConfig):\n    pass\n\n"
        f"def work(config):\n{indented}    return {{}}\n\n"
        "if __name__ == '__main__':\n    raise SystemExit(main(Config, work, work, [], 'work'))\n"
    )
    return [sys.executable, "-m", "commands.job"]


# a shell starts what runs in the background with SIGINT ignored, and nohup with SIGHUP. Not by `preexec_fn`: for that
# Python forks, and the handlers that gRPC has for a fork break this process's own connection to Ray
DEFAULT_SIGNALS = ("env", "--default-signal=INT,TERM,HUP")


def interrupted(
    words: Sequence[str],
    ready: Callable[[Path], bool],
    tmp_path: Path,
    *signals: int,
    group: bool = False,
) -> Ended:
    """Start a command, send it `signals` when it is ready (or tells so in its output), and wait for its end."""
    out, err = tmp_path / "out", tmp_path / "err"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    with open(out, "w") as stdout, open(err, "w") as stderr:
        process = subprocess.Popen(
            [*DEFAULT_SIGNALS, *words],
            cwd=tmp_path,
            env=environment,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not ready(out):
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < deadline, "never became ready"
            time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        for number in signals:
            (os.killpg if group else os.kill)(process.pid, number)
            time.sleep(0.1)
        try:
            code = process.wait(60)
        finally:
            process.kill()
    seconds = time.monotonic() - began
    # a killed process may take a moment to give back its memory, and is a zombie until the init process has seen it
    alive = [child.pid for child in psutil.wait_procs(below, timeout=LIMIT)[1] if not is_zombie(child)]
    return Ended(code, seconds, out.read_text().splitlines(), err.read_text().splitlines(), alive)


def is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def says(text: str) -> Callable[[Path], bool]:
    return lambda out: text in out.read_text()


def assert_clean(ended: Ended, code: int) -> None:
    assert ended.code == code
    assert ended.seconds < LIMIT
    assert len(ended.err) == 1
    assert ended.err[0].startswith("interrupted; run the same command again to continue")
    assert json.loads(ended.out[-1]) == {"error": ended.err[0], "exit_code": code}
    assert ended.alive == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_that_is_in_c(tmp_path: Path, number: int, code: int) -> None:
    assert_clean(interrupted(command(tmp_path, IN_C), says("working"), tmp_path, number), code)


def test_a_second_signal_changes_nothing(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    assert_clean(interrupted(command(tmp_path, IN_PYTHON), says("working"), tmp_path, *numbers), 130)


def test_a_signal_ends_a_command_that_still_imports(tmp_path: Path) -> None:
    body = command(tmp_path, "")
    job = tmp_path / "commands" / "job.py"
    job.write_text("print('working', flush=True)\nimport time\ntime.sleep(600)\n")
    assert_clean(interrupted(body, says("working"), tmp_path, signal.SIGINT), 130)


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path: Path) -> None:
    words = command(tmp_path, "import time\nprint('working', flush=True)\ntime.sleep(1)")
    ended = interrupted(["nohup", *words], says("working"), tmp_path, signal.SIGHUP)
    assert ended.code == 0


@pytest.mark.parametrize(("number", "code", "group"), [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)])
def test_nothing_of_a_local_ray_is_left(tmp_path: Path, number: int, code: int, group: bool) -> None:
    running, before = tmp_path / "running", set(os.listdir("/dev/shm"))
    words = command(tmp_path, f"PATH = {str(running)!r}\n{IN_RAY}")
    os.environ["TMPDIR"] = str(tmp_path)
    try:
        ended = interrupted(words, lambda _: running.exists(), tmp_path, number, number, group=group)
    finally:
        del os.environ["TMPDIR"]
    assert_clean(ended, code)
    assert set(os.listdir("/dev/shm")) <= before
    assert not list(tmp_path.glob("zsr-*"))


def test_the_line_names_the_staging_area_that_is_kept(tmp_path: Path) -> None:
    body = (
        "import time\nfrom pathlib import Path\nfrom zsr.artifact import Plan, Store\n"
        "staging = Store.at('made').staging(Plan('data', {}, {}))\nstaging.write('piece', b'1')\n"
        "print('working', flush=True)\ntime.sleep(600)\n"
    )
    ended = interrupted(command(tmp_path, body), says("working"), tmp_path, signal.SIGINT)
    assert_clean(ended, 130)
    assert ended.err[0].endswith(tuple(str(path.relative_to(tmp_path)) for path in tmp_path.glob("made/staging/*")))
    assert next(tmp_path.glob("made/staging/*/files/piece")).read_bytes() == b"1"
