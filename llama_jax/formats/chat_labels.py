"""Conversations for training: ids, and which of them are the assistant's own.

Which text the assistant wrote is proved, not guessed. For every assistant turn the conversation
up to it is rendered as serving would (with the generation prompt), then with the turn; if each is
the beginning of the next and of the whole, the difference is what the model has to write. A turn
ends with its terminator, the last control token before the next turn's header, whatever the
tokenizer calls its end token. Templates whose renderings do not nest need {% generation %} blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.formats.chat import Rendered, chat_template, render_chat, with_begin
from llama_jax.formats.template import ChatTemplate, Message
from llama_jax.formats.template_bounds import TemplateError
from llama_jax.formats.tokenizer import Tokenizer

Span = tuple[int, int]


def chat_with_labels(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | ChatTemplate | None = None,
    last_turn_only: bool = False,
    **variables: Any,
) -> tuple[list[int], list[int]]:
    """(ids, loss_mask): 1 on every assistant turn and its terminator, 0 elsewhere; with
    `last_turn_only` 1 on the last turn alone.

    The ids are those serving would see, with one begin token. A token that starts before the
    assistant's text and runs into it belongs to the prompt and is not trained.
    """
    rendered, spans = render_training(
        tokenizer, messages, tools=tools, template=template, **variables
    )
    if last_turn_only:
        spans = spans[-1:]
    ids, ranges = rendered.encode(tokenizer)
    mask = [int(any(start <= at < end for start, end in spans)) for at, _ in ranges]
    with_bos = with_begin(tokenizer, ids)
    return with_bos, [0] * (len(with_bos) - len(ids)) + mask


def render_training(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | ChatTemplate | None = None,
    **variables: Any,
) -> tuple[Rendered, list[Span]]:
    """The training text, and the ranges the assistant wrote, terminators included.

    It ends with an assistant turn, without a header for another. Raises TemplateError where the
    ranges cannot be proved.
    """
    _check_messages(messages)
    compiled = chat_template(tokenizer, template, tools=tools)
    rendered = render_chat(
        tokenizer,
        messages,
        add_generation_prompt=False,
        tools=tools,
        template=compiled,
        **variables,
    )
    render = _Renderer(compiled, messages, tools, variables)
    if problem := _dangling(render, rendered):
        raise TemplateError(problem)
    spans, problem = _nested_spans(render, rendered.text)
    if problem and compiled.has_generation_blocks:
        marked, spans = compiled.render_with_generation(messages, tools=tools, **variables)
        turns = [m for m in messages if m["role"] == "assistant"]
        problem = None
        if marked != rendered.text or len(spans) != len(turns):
            problem = f"its generation blocks give {len(spans)} parts for {len(turns)} turns"
        else:
            spans = _stretched(tokenizer, rendered, spans)
    if problem:
        raise TemplateError(
            f"chat template: cannot prove which text the assistant wrote: {problem}. Put "
            f"{{% generation %}} … {{% endgeneration %}} around the assistant's text in the "
            f"template, or train on shorter conversations (one assistant turn at the end)"
        )
    return rendered, [_with_terminator(tokenizer, rendered, span) for span in spans]


class _Renderer:
    """Renders the first `count` messages, with an extra one if asked."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ):
        self._template, self.messages = template, messages
        self._tools, self._variables = tools, variables

    def __call__(
        self, count: int, *, prompt: bool = False, more: Sequence[Message] = ()
    ) -> str | None:
        """None where the template refuses such a conversation."""
        try:
            return self._template.render(
                [*self.messages[:count], *more],
                add_generation_prompt=prompt,
                tools=self._tools,
                **self._variables,
            )
        except TemplateError:
            return None


def _check_messages(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise TemplateError(
                    f"messages[{index}]: a message to train on needs role and content as text, "
                    f"{key} is {value!r}"
                )
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise TemplateError(
            f"a conversation to train on must end with an assistant turn, this ends with {last}"
        )


def _dangling(render: _Renderer, rendered: Rendered) -> str | None:
    """Text that belongs to a next turn already, such as an assistant header."""
    whole, count = rendered.text, len(render.messages)
    followed = render(count, more=[{"role": "user", "content": "…"}])
    if followed is None or followed.startswith(whole) or render(count, prompt=True) != whole:
        return None
    shared = _shared(whole, followed)
    if shared < _content_end(rendered, (0, len(whole))):
        return None  # earlier text is rewritten once more turns follow; the spans will tell
    return (
        f"chat template writes {whole[shared:]!r} after the last assistant turn even without a "
        f"generation prompt; make it depend on add_generation_prompt"
    )


def _shared(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def _nested_spans(render: _Renderer, whole: str) -> tuple[list[Span], str | None]:
    """What each assistant turn adds to its prompt, or why that cannot be told."""
    spans: list[Span] = []
    for index, message in enumerate(render.messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1)
        where = f"messages[{index}]"
        if before is None or after is None:
            return [], f"it refuses the conversation up to {where}"
        if not after.startswith(before):
            return [], f"the prompt for {where} is not the beginning of the text with it"
        if not whole.startswith(after):
            return [], f"the text up to {where} is not the beginning of the whole"
        spans.append((len(before), len(after)))
    return spans, None


def _content_end(rendered: Rendered, span: Span) -> int:
    """Where the last foreign character in `span` ends, or its start if there is none."""
    start, end = span
    pairs = zip(rendered.text[start:end], rendered.template_text[start:end], strict=True)
    return start + max((at + 1 for at, (sign, own) in enumerate(pairs) if sign != own), default=0)


def _with_terminator(tokenizer: Tokenizer, rendered: Rendered, span: Span) -> Span:
    """`span` cut to end with the control token, or else the text, that ends its turn."""
    start, end = span
    content_end = _content_end(rendered, span)
    control = rendered.control_tokens(tokenizer)
    inside = [token for token in control if content_end <= token[0] and token[1] <= end]
    if inside:
        if rest := rendered.text[inside[-1][1] : end].strip():
            raise TemplateError(
                f"chat template writes {rest!r} after the end of an assistant turn, before the "
                f"next turn begins; it would be trained as the assistant's"
            )
        return start, inside[-1][1]
    suffix = rendered.text[content_end:end]
    if not all(map(_may_be_content, suffix)):
        return start, content_end + len(suffix.rstrip())
    raise TemplateError(
        "chat template does not end assistant turns with a token or text of its own, so the "
        "model would never learn to stop; write eos_token after the assistant's content"
    )


def _may_be_content(sign: str) -> bool:
    """Whether `sign` looks like the template's own also where it is the end of content (see
    provenance)."""
    return sign.isspace() or sign < " " or sign in '"\\'


def _stretched(tokenizer: Tokenizer, rendered: Rendered, spans: list[Span]) -> list[Span]:
    """Generation blocks that stop short of the terminator, stretched over it.

    What follows the last block cannot be a header, so it is the terminator of every turn.
    """
    following = []
    for _, end in spans:
        token = next((t for t in rendered.control_tokens(tokenizer) if t[0] >= end), None)
        is_next = token is not None and not rendered.text[end : token[0]].strip()
        following.append(token if is_next else None)
    terminator = following[-1]
    if terminator is None or any(f is None or f[2] != terminator[2] for f in following):
        return spans
    return [(start, f[1]) for (start, _), f in zip(spans, following, strict=True) if f]
