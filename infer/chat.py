"""A conversation in a terminal: the answer appears as it is written.

Lines that begin with a slash are commands. Reading and writing are functions, so that the loop
runs without a terminal too.
"""

import sys
from collections.abc import Callable
from typing import Any

from infer.completion import FinishReason
from infer.generate import Generator, parts_of
from infer.params import SamplingParams
from llama_jax.config import Compute

HELP = """/reset          forget the conversation (the system message stays)
/system TEXT    set the system message and forget the conversation; without TEXT, remove it
/help           this list
/exit, /quit    leave (also end of input)"""


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def chat(
    model: Any,
    params: SamplingParams | None = None,
    *,
    system: str | None = None,
    compute: Compute | None = None,
    read: Callable[[str], str] = input,
    show: Callable[[str], None] = _show,
) -> list[dict[str, str]]:
    """Talks until /exit or the end of input, and returns the conversation.

    read: gets the prompt to show and returns a line; EOFError ends the conversation.
    show: gets pieces of text as they come.
    An interrupt (KeyboardInterrupt) during an answer ends the answer and keeps what was said.
    """
    params = SamplingParams() if params is None else params
    if params.n != 1 or params.echo:
        raise ValueError("a chat has one answer at a time; leave n at 1 and echo off")
    config, weights, tokenizer = parts_of(model)
    if tokenizer is None:
        raise ValueError("a chat needs a tokenizer; the model has none")
    generator = Generator(config, weights, tokenizer, compute=compute, batch_size=1)
    conversation = Conversation(generator, params, system=system)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            show("\n")
            return conversation.messages
        if line in ("/exit", "/quit"):
            return conversation.messages
        if line.startswith("/"):
            show(conversation.command(line) + "\n")
        elif line:
            conversation.answer(line, show)


class Conversation:
    """The messages so far, system message first where there is one."""

    def __init__(self, generator: Generator, params: SamplingParams, *, system: str | None):
        self.generator, self.params = generator, params
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        has_system = bool(self.messages) and self.messages[0]["role"] == "system"
        return self.messages[0]["content"] if has_system else None

    def command(self, line: str) -> str:
        """Obeys a line that begins with a slash; returns what to tell."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.reset(self.system)
            return "The conversation is forgotten."
        if name == "/system":
            self.reset(rest.strip() or None)
            return "The system message is " + ("set." if rest.strip() else "removed.")
        if name == "/help":
            return HELP
        return f"There is no command {name}.\n{HELP}"

    def answer(self, question: str, show: Callable[[str], None]) -> None:
        """Adds the question and its answer, showing the answer piece by piece.

        A question that does not fit the context, or that the chat template refuses, is not added.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            pieces = self.generator.stream([asked], self.params, chat=True)
        except ValueError as error:
            show(f"[{error}; /reset forgets the conversation]\n")
            return
        answer, reason = "", None
        try:
            for piece in pieces:
                answer += piece.text
                reason = piece.finish_reason
                show(piece.text)
        except KeyboardInterrupt:
            show(" [interrupted]")
        show(self._ending(reason))
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _ending(self, reason: FinishReason | None) -> str:
        return " [cut at the token limit]\n" if reason == "length" else "\n"
