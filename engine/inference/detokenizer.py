"""Token ids to text in a stream: no half characters, and no text that a stop string may still swallow."""

from collections.abc import Iterable

from utils.tokenizer import StreamDecoder, Tokenizer


class StreamDetokenizer:
    """Takes ids one at a time; `text` is the part that is final, up to the first of the stop strings.

    `stopped`: a stop string was found; it is not part of the text. `starts[i]`: characters before id i; the id
    belongs to the text if that is less than len(text), or if nothing was cut off.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self.starts: list[int] = []
        self._stop = tuple(stop)
        self._held = ""  # decoded, but possibly the start of a stop string
        self._decoder = StreamDecoder(tokenizer)

    def push(self, token_id: int) -> None:
        """Append the text of an id."""
        self.starts.append(len(self.text) + len(self._held))
        self._add(self._decoder.push(token_id))

    def close(self) -> None:
        """End the stream: text that was held back becomes final."""
        if not self.stopped:
            self._add(self._decoder.flush())
        if not self.stopped:
            self.text += self._held
            self._held = ""

    def _add(self, piece: str) -> None:
        self._held += piece
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.text += self._held[: min(found)]
            self._held = ""
            self.stopped = True
        elif piece:
            final = len(self._held) - self._partial_stop()
            self.text += self._held[:final]
            self._held = self._held[final:]

    def _partial_stop(self) -> int:
        """Return how many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stop):
                return n
        return 0
