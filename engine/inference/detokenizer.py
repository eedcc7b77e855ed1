"""Ids to text that stays: streaming never shows half a character, nor what turns out to be a stop string."""

from utils.tokenizer import StreamDecoder


class Writer:
    """Takes ids one at a time; `text` is what is final of their text, up to the first of the stop strings.

    `stopped` tells that one was found; it is not part of the text. `starts` has for every id the number of characters
    before it: an id is part of the text if that is less than len(text), or if nothing was cut.
    """

    def __init__(self, tokenizer, stop=()):
        self.text, self.stopped, self.starts = "", False, []
        self._stop, self._held, self._decoder = tuple(stop), "", StreamDecoder(tokenizer)

    def push(self, token_id: int) -> None:
        """Add an id's text."""
        self.starts.append(len(self.text) + len(self._held))
        self._add(self._decoder.push(token_id))

    def close(self) -> None:
        """The end of the ids: what was held back is text after all."""
        if not self.stopped:
            self._add(self._decoder.flush())
        if not self.stopped:
            self.text, self._held = self.text + self._held, ""

    def _add(self, piece: str) -> None:
        self._held += piece
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.text, self._held, self.stopped = self.text + self._held[: min(found)], "", True
        elif piece:
            final = len(self._held) - self._may_begin()
            self.text, self._held = self.text + self._held[:final], self._held[final:]

    def _may_begin(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-n:]) for stop in self._stop)
            ),
            0,
        )
