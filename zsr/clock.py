"""Measure the cost of a work item in this process: wall seconds, CPU seconds and memory."""

import resource
import time


class Clock:
    """Seconds since it was made, of this process."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        """Wall and CPU seconds, and the most memory that this process ever held, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "wall": round(time.perf_counter() - self.wall, 3),
            "cpu": round(time.process_time() - self.cpu, 3),
            "rss": peak,
        }
