"""A batch with a thread of its own, so that requests may come from anywhere at any time."""

import sys
import threading
import traceback

from engine.inference.scheduler import Batch, QueueFull


class Service:
    """Answers what is submitted, from any thread; `notify` of a request tells its owner that it grew or ended.

    Use it in a `with`, or `close` it: the requests that are left then end as cancelled.
    """

    def __init__(self, model, slots, queue):
        self.batch = Batch(model, slots, queue=queue)
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="batch", daemon=True)
        self._thread.start()

    @property
    def alive(self):
        return self._thread.is_alive()

    def submit(self, *requests):
        """Let requests be answered, all or none: UserError and QueueFull as of `Batch.add`."""
        if self._closing:
            raise QueueFull
        self.batch.add(*requests)
        self._wake.set()

    def close(self):
        self._closing = True
        self._wake.set()
        self._thread.join()
        for request in [*self.batch.running, *self.batch.waiting]:
            request.cancelled = True
        self.batch.step()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _work(self):
        while not self._closing:
            if not self.batch.busy:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                self.batch.step()
            except Exception:  # memory ran out, say: what is being answered is lost, the next may fit
                traceback.print_exc(file=sys.stderr)
                self.batch.abort("error", "the model failed on a request: the server's log says how")
