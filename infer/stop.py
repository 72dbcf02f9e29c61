"""Stop strings: the text ends just before the one that is completed first.

A piece of text may end inside a stop string, so what could still become one is held back until it
either does or cannot any more. Because the string that is completed first wins, the result does
not depend on where the pieces are cut, and streaming shows exactly what the final text has.
"""

from collections.abc import Iterable


class StopMatcher:
    """Feeds pieces, gives back the text that is certainly before any stop string."""

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        self.stopped: str | None = None
        self._held = ""
        self._longest = max(map(len, self.stops), default=0)

    def push(self, piece: str) -> str:
        """Text that may be shown now. After a match (`stopped` names it) nothing comes any more."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = self._first_completed(text)
        if found is not None:
            start, self.stopped = found
            self._held = ""
            return text[:start]
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text

    def _first_completed(self, text: str) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first; of two, the longer."""
        matches = []
        for stop in self.stops:
            start = text.find(stop)
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        return min(matches)[1:] if matches else None

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0
