"""Settings: where they come from, which win, what is refused."""

import dataclasses

import pytest

from infer.server.settings import Secret, Settings, flag_fields
from infer.server.settings_reader import read_settings


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("models: [m]\nport: 1\nhost: a\nmax_slots: 3\nopen_metrics: true\n")
    environment = {"LLAMA_JAX_PORT": "2", "LLAMA_JAX_HOST": "b", "LLAMA_JAX_CACHE_DIR": "off"}
    settings = read_settings({"port": 4, "host": None}, config=path, environment=environment)
    assert (settings.port, settings.host, settings.max_slots) == (4, "b", 3)
    assert settings.open_metrics and settings.models == ("m",)


def test_every_setting_can_be_spelled_as_a_text():
    spelled = {
        "models": "a,b", "models_dir": "d", "host": "h", "cors_origins": "https://a, https://b",
        "log_level": "debug", "adapters": "a=b", "dtype": "float32", "api_key": "key-number-1",
        "admin_key": "key-number-2", "otlp_endpoint": "https://c",
    }  # fmt: skip
    for each in flag_fields():
        if each.name not in spelled:
            spelled[each.name] = "true" if each.type is bool else "2048"
    environment = {f"LLAMA_JAX_{name.upper()}": text for name, text in spelled.items()}
    settings = read_settings({}, environment=environment)
    assert settings.models == ("a", "b")
    assert settings.cors_origins == ("https://a", "https://b")
    defaults = Settings(models=("m",))
    for each in dataclasses.fields(Settings):
        if each.metadata.get("yaml_only"):
            continue
        if each.name not in ("max_connections", "max_header_bytes"):
            value = getattr(settings, each.name)
            default = getattr(defaults, each.name)
            assert value != default or each.type is bool, each.name
            kinds = (type(default),) if default is not None else (int, float, str, Secret)
            assert isinstance(value, kinds), each.name


def test_null_in_a_file_is_as_if_absent(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("models: [m]\nport: null\nmax_slots:\n")
    assert read_settings({}, config=path, environment={}) == Settings(models=("m",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modles: [m]", "no setting 'modles'; did you mean models"),
        ("models: m", "must be a list"),
        ("models: [m]\nport: '8'", "must be of type int"),
        ("models: [m]\nport: 70000", "ports end"),
        ("models: [m]\nport: -1", "at least 0"),
        ("models: [m]\nqueue_limit: 0", "at least 1"),
        ("models: [m]\nopen_metrics: 1", "must be of type bool"),
        ("models: [m]\ndrain_seconds: .nan", "must be of type float"),
        ("models: [m]\nlog_level: loud", "log_level is 'loud'"),
        ("models: [m]\nhost: ''", "host is empty"),
        ("models: [m]\ndraft_model: d", "draft_tokens is 0; say how many"),
        ("models: [m]\nmax_lora_rank: 8", "max_adapters is 0, so that no adapter has a rank"),
        ("models: [m]\nload_on_demand: false", "load_on_demand is False, .* no models_dir"),
        ("models: [m]\nidle_unload_seconds: 9", "idle_unload_seconds is 9.0, .* no models_dir"),
        ("models: [m]\nverify_hashes: false", "verify_hashes is False, .* no models_dir"),
        ("models: [a, b, c]\nmax_loaded: 2", "3 models are given, .* max_loaded is 2; raise it"),
        ("port: 1", "nothing to serve"),
        ("- m", "must be a mapping"),
        ("models: [", "is not valid YAML"),
        ("models: [m]\nport: 80\nport: 90", "the key 'port' is given twice"),
        ("models: [m]\napi_key:", "api_key is empty; leave it out to serve without"),
        ("models: [m]\nadmin_key: null", "admin_key is empty"),
        ("models: [m]\ntenants:", "tenants is empty"),
        ("models: [m]\nrequests_per_minute: 0", "it must be above 0"),
        ("models: [m]\nrequest_timeout_seconds: 0", "it must be above 0"),
        ("models: [m]\nhead_timeout_seconds: 0", "it must be above 0"),
        ("models: [m]\ndrain_seconds: 1e30", "it must be at most"),
        ("models: [m]\nmax_tokens: 0", "at least 1"),
        ("models_dir: ''", "models_dir is empty"),
        ("models: [m]\notlp_endpoint: foo", "'foo'; it must be a URL"),
        ("models: [m]\ntenants: [{name: admin, key: key-of-a-tenant}]", "the server's own"),
        ("models: [m]\napi_key: short", "^api_key must be a text of at least 8"),
        ("models: [m]\napi_key: 12345678", "must be of type str"),
        ("models: [m]\napi_key: same-key-twice\nadmin_key: same-key-twice", "are the same"),
        ("models: [m]\ntenants: [{name: a}]", "key is missing"),
        ("models: [m]\ntenants: [{name: a, key: key-of-a-tenant, rate: 1}]", "no field 'rate'"),
        ("models: [m]\ntenants: [{name: a b, key: key-of-a-tenant}]", "name 'a b'"),
        (
            "models: [m]\ntenants: [{name: a, key: key-of-a-tenant, requests_per_minute: 0}]",
            "above 0",
        ),
        (
            "models: [m]\ntenants:\n- {name: a, key: key-of-a-1}\n- {name: a, key: key-of-a-2}",
            "appears twice",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, said):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        read_settings({}, config=path, environment={})
    assert "12345678" not in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("LLAMA_JAX_API_KEYS", "x", "did you mean LLAMA_JAX_API_KEY"),
        ("LLAMA_JAX_PORT", "tcp://10.0.0.1:80", "must be an integer"),
        ("LLAMA_JAX_OPEN_METRICS", "maybe", "true or false"),
        ("LLAMA_JAX_DRAIN_SECONDS", "inf", "finite number"),
        ("LLAMA_JAX_API_KEY", "", "is empty"),
    ],
)
def test_what_is_wrong_in_a_variable_is_named(variable, text, said):
    with pytest.raises(ValueError, match=said):
        read_settings({"models": ("m",)}, environment={variable: text})


def test_variables_that_kubernetes_makes_are_no_settings():
    names = (
        "LLAMA_JAX_SERVICE_HOST LLAMA_JAX_SERVICE_PORT LLAMA_JAX_SERVICE_PORT_REST "
        "LLAMA_JAX_PORT_8000_TCP LLAMA_JAX_PORT_8000_TCP_ADDR LLAMA_JAX_SERVE_PORT_80_TCP_PROTO"
    )
    environment = dict.fromkeys(names.split(), "x")
    assert read_settings({"models": ("m",)}, environment=environment).models == ("m",)


def test_secrets_are_shown_as_stars():  # R106
    settings = Settings(models=("m",), api_key=Secret("key-number-1"))
    for shown in (repr(settings), str(settings), f"{settings.api_key}", f"{settings.api_key!r}"):
        assert "key-number-1" not in shown
    assert "***" in repr(settings)
    assert settings.secrets == ("key-number-1",)


def test_the_page_for_users_names_what_exists():
    import re
    from pathlib import Path

    from infer.server.api_types import IGNORED
    from infer.server.openapi import openapi
    from llama_jax.cli import make_parser

    page = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    settings = {each.name for each in dataclasses.fields(Settings)}
    serve = next(
        parser
        for action in make_parser()._subparsers._group_actions
        for name, parser in action.choices.items()
        if name == "serve"
    )
    known = {flag for action in serve._actions for flag in action.option_strings}
    others = {"--models-dir", "--name", "--version"}  # of register
    others |= {"--serve", "--slice"}  # of fit
    others |= {"--model", "--tasks"}  # of lm_eval
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert flags - others <= known
    variables = {name.lower() for name in re.findall(r"LLAMA_JAX_([A-Z][A-Z_]+)", page)}
    assert variables - {"cache_dir"} <= settings
    routes = set(openapi("0")["paths"]) | {"/", "/docs", "/openapi.json"}
    shown = set(re.findall(r"`(?:GET|POST) (/[\w/.]*)`", page))
    assert shown <= routes
    assert all(f"`{name}`" in page for name in IGNORED)
