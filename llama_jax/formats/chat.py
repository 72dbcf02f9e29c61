"""Conversations to token ids, for serving and for training.

Control tokens in the ids are those the template wrote. Text from messages, tools and variables is
ordinary text whatever it says, so nobody can end another's turn. There is exactly one begin
token where the model has one, whether template, tokenizer or both would write it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.formats.control_tokens import find_control_tokens
from llama_jax.formats.json_fields import check_characters
from llama_jax.formats.long_texts import encode_text
from llama_jax.formats.provenance import Conversation, check_roles, template_text
from llama_jax.formats.sandbox import UnsafeTemplateError
from llama_jax.formats.template import ChatTemplate, Message
from llama_jax.formats.template_bounds import TemplateError
from llama_jax.formats.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Rendered",
    "TemplateError",
    "chat_template",
    "check_templates",
    "encode_chat",
]


def chat_template(
    tokenizer: Tokenizer,
    template: str | ChatTemplate | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> ChatTemplate:
    """The template to use: a compiled one, a template's text, a name, or (None) the default.

    With tools, the template named tool_use is the default where there is one. Compiling is the
    check of a template from a request or a command line.
    """
    if isinstance(template, ChatTemplate):
        return template
    templates = tokenizer.chat_templates
    if template is None:
        template = "tool_use" if tools and "tool_use" in templates else "default"
        if template not in templates:
            known = f"it has {sorted(templates)}" if templates else "it has none"
            raise TemplateError(
                f"the tokenizer has no chat template named {template!r} ({known}); pass a "
                f"template, or use plain text prompts"
            )
    source = templates.get(template, template)
    return ChatTemplate(source, special_tokens=tokenizer.special_tokens, today=tokenizer.today)


def check_templates(tokenizer: Tokenizer | None) -> None:
    """Raises UnsafeTemplateError where one of the tokenizer's templates reaches out of its sandbox.
    What does not compile is no danger, and its models complete texts."""
    if tokenizer is None:
        return
    for name in tokenizer.chat_templates:
        try:
            chat_template(tokenizer, name).check_safe()
        except UnsafeTemplateError as error:
            raise UnsafeTemplateError(
                f"the model's own template {name!r} is refused: {error}; take it out of the "
                f"model, or register the model with --template FILE"
            ) from error
        except TemplateError:
            continue


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the same text with all that the template did not write blanked."""

    text: str
    template_text: str

    def control_tokens(self, tokenizer: Tokenizer) -> list[tuple[int, int, str]]:
        """Where the template wrote a control token: (start, end, token)."""
        return find_control_tokens(self.template_text, tokenizer.control_tokens)

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the range of `text` each came from. Adds no begin token."""
        check_characters(self.text)
        meant = self.control_tokens(tokenizer)
        if find_control_tokens(self.text, tokenizer.control_tokens) == meant:
            encoding = encode_text(tokenizer.backend, self.text)
            return list(encoding.ids), list(encoding.offsets)
        return tokenizer.aliased.encode(self.text, meant)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | ChatTemplate | None = None,
    **variables: Any,
) -> Rendered:
    """The conversation as the model will see it, with the origin of every character."""
    if not messages:
        raise TemplateError("messages is empty; give at least one message")
    compiled = chat_template(tokenizer, template, tools=tools)
    control = list(tokenizer.control_tokens)
    check_roles(messages, control)

    def render(conversation: Conversation) -> str:
        return compiled.render(
            conversation.messages,
            add_generation_prompt=add_generation_prompt,
            tools=conversation.tools,
            **conversation.variables,
        )

    conversation = Conversation(messages, tools, variables)
    text = render(conversation)
    origin = template_text(
        text,
        conversation,
        render,
        literals=compiled.literals,
        control=control,
        cuts_from_end=compiled.cuts_from_end,
    )
    return Rendered(text, origin)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | ChatTemplate | None = None,
    **variables: Any,
) -> list[int]:
    """Ids of a conversation. `variables` are further names for the template.

    Raises TemplateError, with the template's own message where the template refuses.
    """
    rendered = render_chat(
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        template=template,
        **variables,
    )
    return with_begin(tokenizer, rendered.encode(tokenizer)[0])


def with_begin(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """`ids` with the begin token in front, if the model has one and it is not there yet."""
    bos = tokenizer.bos_token_id
    if not tokenizer.adds_bos or bos is None or ids[:1] == [bos]:
        return ids
    return [bos, *ids]
