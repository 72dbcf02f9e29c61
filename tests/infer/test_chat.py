"""The terminal chat, with lines read from a list and text shown into another."""

import pytest

from infer.chat import chat
from infer.params import SamplingParams
from tests.infer.scripted import scripted_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}|{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant|{% endif %}"
)
WORDS = ["user", "assistant", "system", "hi", "be kind", "hel", "lo"]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model():
    """Says "hello" after "assistant"."""
    return scripted_model(WORDS, ["assistant", "hel", "lo", "</s>"], eos=(1,), template=TEMPLATE)


def talk(model, *lines, params=GREEDY, **kwargs):
    waiting, shown = list(lines), []

    def read(prompt):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    messages = chat(model, params, read=read, show=shown.append, **kwargs)
    return messages, shown


def test_an_answer_is_shown_in_pieces_and_kept(model):
    messages, shown = talk(model, "hi", "", "hi")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert {m["content"] for m in messages[1::2]} == {"hello"}
    assert shown[:2] == ["hel", "lo"]
    assert "".join(shown) == "hello\nhello\n\n"


def test_commands(model):
    messages, shown = talk(model, "hi", "/reset", "/system be kind", "hi", "/exit", "hi")
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert "forgotten" in "".join(shown)
    messages, shown = talk(model, "/what", "/help", "/system", "/quit", system="be kind")
    assert messages == []
    assert "no command /what" in "".join(shown) and "removed" in "".join(shown)
    messages, _ = talk(model, "hi", "/reset", system="be kind")
    assert messages == [{"role": "system", "content": "be kind"}]


def test_the_token_limit_is_told(model):
    messages, shown = talk(model, "hi", params=GREEDY.replace(max_tokens=1))
    assert messages[1]["content"] == "hel" and "cut at the token limit" in "".join(shown)


def test_a_question_that_does_not_fit_is_not_added(model):
    config, params, tokenizer = model
    small = (config.replace(max_position_embeddings=16), params, tokenizer)
    messages, shown = talk(small, *["hi"] * 5)
    told = "".join(shown)
    assert "the context holds 16" in told and "/reset" in told
    assert len(messages) < 10 and messages[-1]["role"] == "assistant"


def test_an_interrupt_keeps_what_was_said(model):
    shown = []

    def show(text):
        if text == "lo":
            raise KeyboardInterrupt
        shown.append(text)

    lines = iter(["hi", "/exit"])
    messages = chat(model, GREEDY, read=lambda _: next(lines), show=show)
    assert messages[1]["content"] == "hello" and " [interrupted]" in shown


def test_what_a_chat_cannot_do(model):
    config, params, _ = model
    with pytest.raises(ValueError, match="needs a tokenizer"):
        talk((config, params, None))
    with pytest.raises(ValueError, match="one answer at a time"):
        talk(model, params=GREEDY.replace(n=2))
