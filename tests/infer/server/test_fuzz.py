"""Requests made up from the server's own OpenAPI description: none may break it."""

import warnings

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings

from infer.server.openapi import openapi
from infer.server.settings import Secret
from tests.infer.server.running import running

with warnings.catch_warnings():
    # What it imports is not ours to mend.
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import load_all_checks, not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
HEADERS = {"Authorization": "Bearer key-of-the-admin"}
OPERATIONS = [
    (method.upper(), path) for path, methods in openapi("0")["paths"].items() for method in methods
]


@pytest.fixture(scope="module")
def server():
    with running(admin_key=Secret("key-of-the-admin")) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_made_up_requests_are_answered_as_described(server, schema, method, path):
    load_all_checks()

    @given(case=schema[path][method].as_strategy())
    @hypothesis_settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        case.call_and_validate(base_url=server.url, headers=HEADERS, checks=CHECKS)

    ask()
    assert server.engine.state == "ready"


def test_nothing_is_left_behind(server):
    assert server.engine.is_idle
    assert server.metric("llama_jax_requests_active") == 0
    assert server.metric("llama_jax_http_requests_total", status="500") == 0
