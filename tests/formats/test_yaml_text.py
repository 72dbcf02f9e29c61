"""YAML as people write it: numbers of version 1.2, and no key twice."""

import pytest

from llama_jax.formats.yaml_text import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("1:30", "1:30"),
        ("-7", -7),
        ("0o17", 15),
        ("0x1f", 31),
        ("1e-4", 1e-4),
        ("1_000", "1_000"),
        ("2.5", 2.5),
        ("null", None),
        ("2026-11-30", "2026-11-30"),
        ("2026-11-30 10:00:00", "2026-11-30 10:00:00"),
    ],
)
def test_scalars(text, value):
    parsed = parse_yaml(text, "x.yaml")
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_merge_key_is_followed():
    text = "base: &b {steps: 1, batch: 2}\nrun: {<<: *b, steps: 3}"
    assert parse_yaml(text, "x.yaml")["run"] == {"steps": 3, "batch": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "x.yaml is not valid YAML: .*the key 'a' is given twice"),
        ("[" * 3000, "x.yaml is nested too deeply"),
        ("a: [", "x.yaml is not valid YAML"),
    ],
)
def test_what_is_wrong_comes_with_its_source(text, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        parse_yaml(text, "x.yaml")
