"""A server with a scripted engine, and a client of it, for whoever brings no other."""

import openai
import pytest

from tests.infer.server.running import running


@pytest.fixture(scope="module")
def server():
    with running() as running_server:
        yield running_server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made
