"""Every command has a --help that ends well, names the command as one types it, and says what it is for."""

import json
import sys

import pytest

from zsr.cli import COMMANDS, main
from zsr.commands.index import COMMANDS as OF_INDEX

CALLS = [(name,) for name in COMMANDS if name != "index"] + [("index", command) for command in OF_INDEX]


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_help_is_there(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: zsr {' '.join(words)} ")
    assert "--config" in shown
    assert "--dry-run" in shown
    if words[0] == "index":  # the help of a command is its own, also where commands share flags
        assert " ".join(str(OF_INDEX[words[1]][0].__doc__).split()).split(".")[0] in " ".join(shown.split())


@pytest.mark.parametrize(("words", "listed"), [((), COMMANDS), (("index",), OF_INDEX)])
def test_the_commands_are_listed(
    words: tuple[str, ...], listed: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {' '.join(('zsr', *words))} ")
    assert all(name in shown for name in listed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "zsr: expected a command, found none"),
        (["trian"], "zsr: expected a command, found 'trian'; perhaps train"),
        (["index", "biuld", "--seed", "1"], "zsr index: expected a command, found 'biuld'; perhaps build"),
    ],
)
def test_what_is_no_command_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {said}")
    assert json.loads(shown.out)["error"].startswith(said)


def test_a_command_whose_extra_is_missing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "zsr.commands.search", None)  # as where faiss is not installed
    assert main(["search", "--help"]) == 2
    assert "install the extra `cpu`" in json.loads(capsys.readouterr().out)["error"]
