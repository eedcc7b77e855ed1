"""The worker processes that encode chunks, and their results in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from preprocess_data.pipeline.chunks import Chunk, EncodedChunk
from preprocess_data.pipeline.encode import EncodeConfig, encode_chunk
from utils.errors import UserError


def available_cores() -> int:
    """Cores this process may use: in a container often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of `count` processes (0: one per core); with 1 the calling process encodes. As a context it ends them.

    They start at once, in parallel to what the calling process does first.
    """

    def __init__(self, count: int) -> None:
        self.count = count or available_cores()
        self._pool: ProcessPoolExecutor | None = None
        if self.count > 1:
            # spawn: a forked copy of a process whose tokenizer has started its threads can hang
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _start_worker)
            for _ in range(self.count):
                self._pool.submit(int)

    def encode(self, config: EncodeConfig, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        """Every chunk with its result, in order; at most 2 * count chunks are in memory at a time."""
        if self._pool is None:
            for chunk in chunks:
                yield chunk, encode_chunk(config, chunk)
            return
        running: deque = deque()
        try:
            for chunk in chunks:
                running.append((chunk, self._pool.submit(encode_chunk, config, chunk)))
                if len(running) >= 2 * self.count:
                    first, result = running.popleft()
                    yield first, result.result()
            while running:
                first, result = running.popleft()
                yield first, result.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out: run the same command again, it resumes "
                "from here; fewer --workers need less memory"
            ) from None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker uses one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the main process handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Without this a worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
