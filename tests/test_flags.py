"""Every flag of every job is run by a test or explained in a document; one that is neither is not needed."""

import importlib
import pkgutil
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from zsr import commands
from zsr.commands.base import JobConfig
from zsr.models import MODELS

ROOT = Path(__file__).resolve().parents[1]
NEITHER = {"decisions.md", Path(__file__).name}  # a log of what was decided, and this file


def flags(kind: type[BaseModel]) -> Iterator[str]:
    """Names of all flags; those of nested configurations, too."""
    for name, about in kind.model_fields.items():
        parts = (about.annotation, *typing.get_args(about.annotation))
        nested = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        yield from flags(nested[0]) if nested else (name,)


def kinds() -> dict[str, type[BaseModel]]:
    """Configurations of all jobs and options of all models."""
    found: dict[str, Any] = {}
    for about in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"zsr.commands.{about.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__:
                found[f"{about.name}.{value.__name__}"] = value
    return found | {f"options of {name}": entry.config for name, entry in MODELS.items()}


@cache
def texts() -> str:
    """What tests and documents say."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.py")]
    return "\n".join(path.read_text() for path in files if path.name not in NEITHER)


def used(flag: str) -> bool:
    """Whether `flag` occurs as `--flag`, as a keyword or key, or by itself in code marks."""
    word = "[-_]".join(map(re.escape, flag.split("_")))
    forms = (rf"--(?:[\w.-]+\.)?(?:no-)?{word}(?![\w-])", rf"(?<![\w.]){word}=(?!=)", rf"['\"`]{word}['\"`]")
    return any(re.search(form, texts()) for form in (*forms, rf"(?m)^\s*{word}:"))


@pytest.mark.parametrize("name", sorted(kinds()))
def test_every_flag_is_run_or_explained(name: str) -> None:
    assert [flag for flag in flags(kinds()[name]) if not used(flag)] == []


@pytest.mark.parametrize("name", sorted(name for name, kind in kinds().items() if issubclass(kind, JobConfig)))
def test_required_flags_come_first_and_the_common_ones_last(name: str) -> None:
    fields = kinds()[name].model_fields
    required = [about.is_required() for about in fields.values()]
    assert required == sorted(required, reverse=True)
    assert list(fields)[-1] == "dry_run"
