"""Templates from strangers: no way out of the sandbox, and an end to all work."""

import time
from pathlib import Path, PosixPath

import pytest

from llama_jax.formats.template import ChatTemplate, TemplateError

MESSAGES = [{"role": "user", "content": "hi"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source).render(MESSAGES, add_generation_prompt=False, **variables)


def test_the_examples_of_r113(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for source in (
        '{{ lipsum.__globals__["os"].system("touch MARKER") }}',
        '{{ cycler.__init__.__globals__["os"].system("touch MARKER") }}',
        '{{ "".__class__.__mro__ }}',
    ):
        with pytest.raises(TemplateError):
            render(source.replace("MARKER", str(marker)))
    assert not marker.exists()


@pytest.mark.parametrize(
    "source",
    [
        "{{ (1).__class__ }}",
        "{{ 'x' | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ self._TemplateReference__context }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__code__ }}",
        "{{ namespace.__init__ }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{% if %}",
        "{{ unknown.x }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ raise_exception('no') }}",
        "{% set x = 1",
    ],
)
def test_templates_that_reach_out_or_fail_raise(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(9) %}{% for i in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% for i in range(9000) %}{{ 'a' * 9000000 }}{% endfor %}",
        "{% set s = 'a' * 9000000 %}{% for i in range(9000) %}{% set x = s | upper %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ ['a'] * 10**9 }}",
        "{{ 9**9**9 }}",
        "{{ 9**99999 }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'abc' | center(10**8) }}",
        "{{ 'x' | indent(10**8) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10**9) }}",
        "{{ ('a' * 9000).replace('a', 'b' * 1000000) }}",
        "{{ ('a' * 9000) | replace('a', 'b' * 1000000) }}",
        "{{ ('b' * 1000000).join('a' * 9000) }}",
        "{{ ('a' * 9000) | list | join('b' * 1000000) }}",
        "{{ '{0}{0}{0}'.format('a' * 9000000) }}",
        "{{ ('\\t' * 1000000).expandtabs(1000) }}",
        "{{ ('a' * 900000)|wordwrap(1) }}",
    ],
)
def test_templates_that_run_away_are_stopped(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"chat template|chat template: too much work"):
        render(source)
    assert time.monotonic() - start < 10  # most take milliseconds


def test_ordinary_work_is_within_the_budget() -> None:
    talk = [{"role": "user", "content": "word " * 2000}] * 500  # five megabytes
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '\n' }}{% endfor %}"
    text = ChatTemplate(source).render(talk, add_generation_prompt=False)
    assert len(text) == 500 * (7 + 9999)
    assert render("{{ 1700000000 }}{{ '{}'.format(1700000000) }}{{ '%d' % 1700000000 }}") == (
        "1700000000" * 3
    )


def test_over_long_output_and_sources_are_refused() -> None:
    with pytest.raises(TemplateError, match="writes over"):
        render("{% for i in range(3) %}{{ x }}{% endfor %}", x="a" * 4_000_000)
    with pytest.raises(TemplateError, match="longer than"):
        ChatTemplate("a" * 1_000_001)


def test_errors_name_the_line_and_keep_the_templates_message() -> None:
    with pytest.raises(TemplateError, match=r"line 2: .*unknown tag 'nope'"):
        ChatTemplate("a\n{% nope %}")
    with pytest.raises(TemplateError, match=r"^only two turns$"):
        render("{{ raise_exception('only two turns') }}")


def test_variables_are_plain_values_and_names_of_the_product_are_taken() -> None:
    assert render("{{ x.a[0] }}", x={"a": (1, 2)}) == "1"
    with pytest.raises(TemplateError, match="take JSON values, got a PosixPath"):
        render("{{ x }}", x=PosixPath())
    for name in ("documents", "bos_token"):
        template = ChatTemplate("", special_tokens={"bos_token": "<s>"})
        with pytest.raises(TemplateError, match=rf"variables \['{name}'\] are set by the product"):
            template.render(MESSAGES, add_generation_prompt=False, **{name: "x"})
    with pytest.raises(TemplateError, match="must be an object with role and content"):
        ChatTemplate("").render(["x"], add_generation_prompt=False)


def test_messages_are_the_templates_own_copy() -> None:
    message = {"role": "user", "content": "x", "tool_calls": None}
    source = "{{ 'tool_calls' in messages[0] }}{% set x = messages[0] %}"
    assert ChatTemplate(source).render([message], add_generation_prompt=False) == "False"
    assert message == {"role": "user", "content": "x", "tool_calls": None}


def test_generation_blocks_give_the_ranges_they_wrote() -> None:
    source = "a{% generation %}{{ messages[0].content }}{% endgeneration %}b"
    template = ChatTemplate(source)
    assert template.render_with_generation(MESSAGES) == ("ahib", [(1, 3)])
    assert template.render(MESSAGES, add_generation_prompt=False) == "ahib"
    assert template.has_generation_blocks
