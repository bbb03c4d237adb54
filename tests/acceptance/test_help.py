"""Every command has a --help that ends well, names the command as one types it, and says what it is for."""

from importlib import import_module
from pathlib import Path

import pytest

from jobs.index import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[a-z]*.py"))
ENTRY = {"local": "serve", "start": "main"}  # what `python -m cluster.NAME` calls; all others call `run`
CALLS: list[tuple[str, str, tuple[str, ...]]] = [("jobs", name, ()) for name in JOBS]
CALLS += [("jobs", "index", (command,)) for command in COMMANDS]
CALLS += [("cluster", name, ()) for name in ("local", "start", "submit")]


@pytest.mark.parametrize(("package", "name", "words"), CALLS, ids=lambda value: str(value))
def test_help_is_there(package: str, name: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    run = getattr(import_module(f"{package}.{name}"), ENTRY.get(name, "run"))
    try:
        code = run([*words, "--help"])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr().out
    assert code in (0, None)
    assert f"python -m {package}.{' '.join((name, *words))}" in shown
    assert "__main__" not in shown
    if package == "jobs" and (name != "index" or words):
        assert "--config" in shown
        assert "--plan" in shown


def test_every_job_is_called() -> None:
    assert {"prepare", "features", "semantics", "train", "embed", "index", "search", "evaluate", "demo"} <= set(JOBS)
