"""Many prompts at once on the batching engine, from a list to a list.

A slot that is done takes the next prompt at once, and prompts that begin alike share that work; the
answers are those of `generate`.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

from infer.completion import Output, Piece
from infer.engine.engine import BatchingEngine
from infer.engine.memory import longest_context
from infer.engine.options import EngineOptions
from infer.engine.request import Event, Failed, Request, Started
from infer.generate import Generations, Generator, Stats, parts_of
from infer.params import SamplingParams
from llama_jax.config import Compute

BLOCK_SIZE = 32


class _Answer:
    """The events of one request, gathered in the engine's thread."""

    def __init__(self, prompt: Any, tokens: list[int], params: SamplingParams, number: int):
        self._prompt, self._tokens, self._params, self._number = prompt, tokens, params, number
        self._pieces: list[Piece] = []
        self._started: Started | None = None
        self._failed: Failed | None = None
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece):
            self._pieces.append(event)
        elif isinstance(event, Started):
            self._started = event
        else:
            self._failed = event if isinstance(event, Failed) else None
            self._ended.set()

    def outputs(self, *, has_text: bool) -> list[Output]:
        """Waits. Raises RuntimeError where the engine could not answer."""
        self._ended.wait()
        if self._failed is not None:
            raise RuntimeError(f"prompt {self._number}: {self._failed.message}")
        return [self._output(index, has_text) for index in range(self._params.n)]

    def _output(self, index: int, has_text: bool) -> Output:
        assert self._started is not None
        pieces = [piece for piece in self._pieces if piece.index == index]
        reason = pieces[-1].finish_reason
        assert reason is not None
        logprobs = [each for piece in pieces for each in piece.logprobs]
        return Output(
            prompt=self._prompt,
            text="".join(piece.text for piece in pieces) if has_text else None,
            token_ids=[token for piece in pieces for token in piece.token_ids],
            finish_reason=reason,
            logprobs=None if self._params.logprobs is None else logprobs,
            prompt_token_ids=self._tokens,
            prompt_index=self._number,
            index=index,
            prompt_logprobs=self._started.prompt_logprobs,
        )


def complete(
    model: Any,
    prompts: Sequence[Any],
    params: SamplingParams,
    *,
    chat: bool = False,
    compute: Compute | None = None,
    batch_size: int,
) -> Generations:
    """What `generate` gives for the same prompts, with `batch_size` choices computed together.

    Raises ValueError as `generate` does, before anything is computed. The seconds, all of them in
    `decode_seconds`, do not count the start of the engine, which compiles.
    """
    config, weights, tokenizer = parts_of(model)
    checked = Generator(config, weights, tokenizer, compute=compute, batch_size=batch_size)
    encoded = [
        checked.encode(prompt, chat=chat, where=f"prompt {number}")
        for number, prompt in enumerate(prompts)
    ]
    checked.check_wishes(params, where="the request")
    limits = [params.limit_tokens(len(ids), checked.max_context) for ids in encoded]
    context = max(len(ids) + limit for ids, limit in zip(encoded, limits, strict=True))
    if context > longest_context(config):
        # Angles follow the length of the whole prompt there, which the engine reads in pieces.
        return checked.generate(prompts, params, chat=chat)
    engine = BatchingEngine(
        (config, checked.model.params, tokenizer),
        EngineOptions(
            max_slots=min(batch_size, params.n * len(prompts)),
            max_context=context,
            queue_limit=len(prompts),
            block_size=BLOCK_SIZE,
        ),
        compute=compute,
    )
    answers = [
        _Answer(prompt, ids, params, number)
        for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True))
    ]
    engine.start()
    began = time.perf_counter()
    try:
        for number, (ids, answer) in enumerate(zip(encoded, answers, strict=True)):
            request = Request(str(number), tuple(ids), params, continues_text=not chat)
            engine.submit(request, answer)
        has_text = tokenizer is not None
        outputs = [output for each in answers for output in each.outputs(has_text=has_text)]
        seconds = time.perf_counter() - began
    finally:
        engine.stop(0)
    stats = Stats(
        prompt_tokens=sum(map(len, encoded)),
        new_tokens=sum(len(output.token_ids) for output in outputs),
        decode_seconds=seconds,
    )
    return Generations(outputs, stats)
