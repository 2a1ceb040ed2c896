"""Work that goes on beside the caller's own, e.g. writing a checkpoint while the next round
trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class Background:
    """Does one job at a time, in the order given; leaving the block waits for the last one.

    A job's error is raised by the next `do` or `wait`, or at the block's end.

    Example:
        >>> done = []
        >>> with Background() as background:
        ...     background.do(lambda: done.append(1))
        >>> done
        [1]
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._job: Future[object] | None = None

    def do(self, job: Callable[[], object]) -> None:
        """Starts a job once the one before is done."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Returns when nothing is left to do, or raises what the job raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()
