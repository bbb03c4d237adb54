"""Every model trains in bfloat16 at the sizes of its paper, and every tower embeds: on a GPU, where there is one.

Without one, the same program runs for one model and one tower on the CPU, so that it is known to work.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import TOWERS
from benchmarks.paper_sizes import CASES


def table(*flags: object) -> dict[str, list[str]]:
    """Cells of each row that `benchmarks.gpu` prints, by what was run; it fails where a term is not finite."""
    words = [sys.executable, "-m", "benchmarks.gpu", *map(str, flags)]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows[1:]}


def test_the_program_runs_without_a_gpu() -> None:
    found = table("--device", "cpu", "--only", "lcale", "--towers", "lite0", "--batch", 8, "--steps", 1)
    assert list(found) == ["lcale", "lite0, forward"]
    assert all(float(cells[0].replace(",", "")) > 0 for cells in found.values())


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_model_trains_in_bfloat16_and_every_tower_embeds_on_a_gpu() -> None:
    found = table("--steps", 5)
    assert list(found) == [*CASES, *(f"{name}, forward" for name in TOWERS)]
    assert all(0 < float(cells[3]) <= 1.05 for cells in found.values())  # busy share of the device
