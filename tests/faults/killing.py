"""Start a job, SIGKILL its driver after a while or at a fault point, and read what a job says that came to its end."""

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any


def finish(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """Run to the end with these variables set; the JSON line. Raises CalledProcessError if the job fails."""
    given = {**os.environ, **environment}
    done = subprocess.run(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def kill_after(command: Sequence[str], seconds: float) -> bool:
    """Start the job and SIGKILL its driver after that time; whether it was still running."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    return False


def kill_at(command: Sequence[str], point: str) -> int:
    """Run the job with a fault point armed, `NAME@N` for its N-th passing in a process; how the job ended."""
    name, _, nth = point.partition("@")
    environment = {**os.environ, "ZSR_FAULT": f"{name}=kill@{nth or 1}"}
    quiet = subprocess.DEVNULL
    return subprocess.run(command, env=environment, stdout=quiet, stderr=quiet, check=False).returncode
