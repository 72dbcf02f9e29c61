"""YAML, read strictly: what is wrong with a text comes with the name of its source."""

import re
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"  # of `<<`, whose mapping's keys may be given anew


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number, 010 as ten, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML implements, wants a dot and a signed exponent in a float, and reads 010 as
# eight, 1:30 as ninety and 2026-11-30 as an object that JSON does not have; YAML 1.2 and people do
# not.
_INTEGER, _TIMESTAMP = "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in each if tag not in (_INTEGER, _TIMESTAMP)]
    for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INTEGER, re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Loader.add_constructor(_INTEGER, lambda loader, node: int(node.value, _base(node.value)))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _base(text: str) -> int:
    return {"0o": 8, "0x": 16}.get(text[:2], 10)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; `source` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deeply") from error
