"""A client that waits: submits requests and gathers what comes back."""

import threading

from infer.completion import Piece
from infer.engine.request import Failed, Finished, Request, Started

SECONDS = 120


class Answer:
    """The events of one request, from the engine's thread."""

    def __init__(self):
        self.events = []
        self.ended = threading.Event()
        self.started = threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Started):
            self.started.set()
        if isinstance(event, Finished | Failed):
            self.started.set()
            self.ended.set()

    def wait(self):
        assert self.ended.wait(SECONDS), "the request did not end"
        return self

    @property
    def last(self):
        return self.events[-1]

    @property
    def start(self):
        return next(event for event in self.events if isinstance(event, Started))

    @property
    def pieces(self):
        return [event for event in self.events if isinstance(event, Piece)]

    def token_ids(self, index=0):
        return [t for piece in self.pieces if piece.index == index for t in piece.token_ids]

    def text(self, index=0):
        return "".join(piece.text for piece in self.pieces if piece.index == index)

    def finish_reason(self, index=0):
        reasons = [p.finish_reason for p in self.pieces if p.index == index and p.finish_reason]
        assert len(reasons) == 1
        return reasons[0]


def submit(engine, request: Request) -> Answer:
    answer = Answer()
    engine.submit(request, answer)
    return answer


def ask(engine, *requests: Request) -> list[Answer]:
    """All at once; waits for all of them."""
    return [answer.wait() for answer in [submit(engine, request) for request in requests]]
