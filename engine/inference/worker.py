"""A scheduler in a thread of its own: requests may be submitted from any thread at any time."""

import sys
import threading
import traceback

from engine.inference.request import Request
from engine.inference.scheduler import QueueFull, Scheduler
from engine.inference.threads import AVAILABLE


class BatchWorker:
    """Runs the scheduler while there are requests; a request's `notify` is called when it got a token or ended.

    The thread starts with the first request. Use it in a `with`, or `close` it: requests that are left are cancelled.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        scheduler.batch.threads.limit = AVAILABLE  # its thread is its own, whatever the calling one uses
        self._wake = threading.Event()
        self._closing = False
        self._submitting = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._closing and (self._thread is None or self._thread.is_alive())

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none; UserError and QueueFull as `Scheduler.add`, QueueFull after `close`."""
        with self._submitting:
            if self._closing:
                raise QueueFull
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="batch-worker", daemon=True)
                self._thread.start()
            self.scheduler.add(*requests)  # under the lock: `close` cancels what was added before it
        self._wake.set()

    def close(self) -> None:
        """Stop the thread after the current step and cancel the requests that are left."""
        with self._submitting:
            self._closing = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            request.cancelled = True
        if self.scheduler.busy:
            self.scheduler.step()

    def __enter__(self) -> "BatchWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing:
            if not self.scheduler.busy:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                self.scheduler.step()
            except Exception as error:  # e.g. out of memory: the running requests fail, the next one may fit
                failed = self.scheduler.abort("the model failed on a request: see the server's log", error)
                if not all(request.reraise for request in failed):
                    traceback.print_exc(file=sys.stderr)
