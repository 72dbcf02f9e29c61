"""Templates from strangers: no way out of the sandbox, and an end to all work."""

import time
from pathlib import Path, PosixPath

import pytest

from llama_jax.formats.sandbox import UnsafeTemplateError
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
    "expression", ["lipsum.__globals__", "messages[0]['__class__']", "(1).__class__.x"]
)
def test_internals_are_refused_in_branches_that_are_not_taken(expression: str) -> None:
    with pytest.raises(UnsafeTemplateError, match="in line 2, which is not safe"):
        ChatTemplate(f"{{% if tools %}}\n{{{{ {expression} }}}}{{% endif %}}")
    ChatTemplate("{{ messages[0]['content__'] == '__start__' }}").check_safe()


@pytest.mark.parametrize("field", ["{0.__class__}", "{x[0]._private}", "{0[__init__]}"])
def test_formats_of_private_names_are_no_mere_errors(field: str) -> None:
    with pytest.raises(UnsafeTemplateError, match="private name, which is not safe"):
        ChatTemplate("{{ FIELD.format('a', x='a') }}".replace("FIELD", repr(field))).check_safe()


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


def doubled(step: str, start: str = "['aaaaaaaaaa']") -> str:
    return (
        f"{{% set n = namespace(x={start}, y={start}) %}}{{% for i in range(40) %}}"
        f"{{% set n.x = {step} %}}{{% set n.y = {step.replace('n.x', 'n.y')} %}}{{% endfor %}}"
    )


@pytest.mark.parametrize(
    "source",
    [
        doubled("[n.x, n.x]") + "{{ n.x }}",
        doubled("[n.x, n.x]") + "{{ n.x == n.y }}",
        doubled("(n.x, n.x)", "('aaaaaaaaaa',)") + "{{ {n.x: 1} }}",
        doubled("{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}",
        doubled("[n.x] * 2"),
        doubled("[n.x] + [n.x]"),
        doubled("dict(a=n.x, b=n.x)"),
        doubled("dict.fromkeys('ab', n.x)"),
        doubled("cycler(n.x, n.x).items"),
        doubled("[loop.cycle(n.x), n.x]"),
        doubled("[n.x, n.x] | batch(2) | first"),
        doubled("[n.x] | slice(1, n.x) | list"),
        doubled("(n.x,)").replace("40", "9000"),
        doubled("n.x * n.x", "10**6"),
        "{% macro f() %}{% set n.x = varargs %}{% endmacro %}"
        "{% set n = namespace(x=[]) %}{% for i in range(40) %}{{ f(n.x, n.x) }}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(40) %}"
        "{% for b in [n.x, n.x] | batch(2) %}{% set n.x = b %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(40) %}"
        "{% set z %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = z %}{% endfor %}",
        "{% set x = 'a' * 9000000 %}{% macro f() %}{% for i in range(999) %}{{ x }}{% endfor %}"
        "{% endmacro %}{{ f() }}",
        "{{ 'a'.encode() * 10**9 }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ {}.fromkeys(range(0, 99999 * (2**61 - 1), 2**61 - 1)) }}",
        "{{ dict.fromkeys(range(0, 99999 * (2**61 - 1), 2**61 - 1)) }}",
        "{{ ({'a': 1}.keys() - []).union('a') }}",
        "{{ ('{0:>999999}' * 9000).format(1) }}",
        "{{ ('%999999d' * 9000) % ((1,) * 9000) }}",
        "{{ '{:>{}}'.format(1, '9000000000') }}",
        "{{ ('{0.x}' * 9000).format(namespace(x='a' * 9000000)) }}",
        "{{ ('a' * 9000).replace('a', 'b' * 1000000, -1) }}",
        "{{ range(9000) | map('string') | join('b' * 1000000) }}",
        "{{ (['a'] * 999) | join(attribute='0', d='b' * 9000000) }}",
        "{{ [[[1]]] | tojson(indent=1000000) }}",
        "{{ range(99999) | list | tojson(indent=90000) }}",
        "{{ range(9999) | list | tojson(separators=('b' * 1000000, ':')) }}",
        "{{ ([[1, 2]] * 20000) | sum(start=[]) }}",
        "{{ ('a' * 5000000).rfind('b' + 'a' * 2000000) }}",
        "{{ ('a' * 5000000).strip('b' * 4000000 ~ 'a') }}",
        "{{ ('a' * 5000000) | trim('b' * 4000000 ~ 'a') }}",
        "{{ ('a ' * 4000000).split() | length }}",
        "{{ ('a ' * 4000000).split(' ') | length }}",
        "{{ ('a ' * 4000000) | title }}",
        "{{ ('a ' * 4000000) | list | length }}",
        "{{ ('a ' * 4000000) | select('none') | list }}",
        "{{ ('\n' * 9000000).splitlines() | length }}",
        "{{ [1] | slice(1000000) | list }}",
        "{{ (['a'] * 1000) | sort(attribute='0,' * 400000 ~ '0') }}",
        "{{ (')' * 99999 ~ 'x') | urlize }}",
        "{{ range(99999) | list | pprint }}",
    ],
)
def test_values_that_explode_are_refused_before_they_are_made(source: str) -> None:
    start = time.process_time()
    with pytest.raises(TemplateError, match="chat template"):
        render(source)
    assert time.process_time() - start < 2  # most take milliseconds


def test_ordinary_values_are_made() -> None:
    talk = [{"role": "user", "content": "word " * 2000}] * 400
    source = (
        "{% set n = namespace(kept=[]) %}{% for m in messages[1:] %}"
        "{% set n.kept = n.kept + [m] %}{% endfor %}{{ n.kept | length }}"
        "{{ n.kept | map(attribute='content') | join('\n\n') | length }}"
        "{{ n.kept[0].content.rsplit(' ', 1)[0].strip('d').split('wo') | length }}"
    )
    text = ChatTemplate(source).render(talk, add_generation_prompt=False)
    assert text == f"399{399 * 10_002 - 2}2001"
    assert render('{{ \'{"a": {"b": [%s]}}\' % 1 }}') == '{"a": {"b": [1]}}'
    assert render("{{ '{{{:.2f}}}'.format(1.5) }}") == "{1.50}"
    assert render("{{ x | tojson(indent=1) }}", x={"a": [1]}) == '{\n "a": [\n  1\n ]\n}'
    assert render("{{ dict.fromkeys('ab', 1) }}{{ dict([('a', 1)], b=2) }}") == (
        "{'a': 1, 'b': 1}{'a': 1, 'b': 2}"
    )
    assert render("{{ 2**64 - 1 }}{{ [[1], [2]] | sum(start=[]) }}") == f"{2**64 - 1}[1, 2]"


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
