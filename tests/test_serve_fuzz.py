"""Two thousand random requests: none is answered by a 5xx, and the server serves on."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import NAME, Running, byte_tokenizer, running

schemathesis = pytest.importorskip("schemathesis")
FROM_SCHEMA, MUTATED, RAW = 150, 700, 300  # requests, the first two for each of two paths: 2,000 in all

PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "hello", "max_tokens": 4, "echo": True, "logprobs": 1},
}
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"),
    *("stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "n", "tools", "logit_bias", "user"),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 300)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from((NAME, "user", "system", "text", "", "\ud800", 2**64, -(2**63), 1e-300, "x" * 700))
)
NAMES = st.sampled_from(("role", "content", "type", "text", "include_usage", "\x00"))
OBJECTS = st.dictionaries(NAMES, LEAVES, max_size=3)
VALUES = LEAVES | OBJECTS | st.lists(LEAVES | OBJECTS | st.lists(LEAVES, max_size=3), max_size=4)
few = {"suppress_health_check": list(HealthCheck)}


class Client:
    """One connection that is kept, for thousands of requests."""

    def __init__(self, server: Running) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=30)
        self.statuses: dict[int, int] = {}

    def send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> bytes:
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        content = response.read()
        self.statuses[response.status] = self.statuses.get(response.status, 0) + 1
        assert response.status < 500, (method, path, body, content)
        if response.status >= 400:
            assert json.loads(content)["error"]["message"]
        return content

    def post(self, path: str, body: Any) -> bytes:
        return self.send("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(byte_tokenizer(tmp_path_factory.mktemp("fuzz")), max_tokens=64) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Client]:
    made = Client(server)
    yield made
    made.connection.close()


@pytest.fixture(autouse=True)
def serves_on(client: Client) -> Iterator[None]:
    """Each kind of request is answered before and after, in the same words."""
    before = [json.loads(client.post(path, body))["choices"] for path, body in PATHS.items()]
    yield
    assert [json.loads(client.post(path, body))["choices"] for path, body in PATHS.items()] == before


@pytest.mark.parametrize("path", PATHS)
def test_by_its_own_description(path: str, client: Client) -> None:
    described = json.loads(client.send("GET", "/openapi.json", None, {}))
    operation = schemathesis.openapi.from_dict(described)[path]["POST"]

    @settings(max_examples=FROM_SCHEMA, **few)
    @given(operation.as_strategy())
    def asked(case: Any) -> None:
        client.post(path, case.body)

    client.statuses.clear()
    asked()
    assert sum(client.statuses.values()) >= FROM_SCHEMA
    assert client.statuses[200] > 10


@pytest.mark.parametrize("path", PATHS)
def test_by_changed_fields(path: str, client: Client) -> None:
    @settings(max_examples=MUTATED, **few)
    @given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
    def asked(changes: dict[str, Any]) -> None:
        client.post(path, {**PATHS[path], **changes})

    client.statuses.clear()
    asked()
    assert sum(client.statuses.values()) >= MUTATED
    assert client.statuses[200] > 10
    assert client.statuses[400] > 10


def test_by_any_bytes(client: Client) -> None:
    kinds = st.sampled_from(
        ("application/json", "text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data")
    )
    places = st.sampled_from(
        (*PATHS, "/", "/metrics", "/stats", "/v1/models", "/v1/models/x", "/%00", "/v1/completions?a=b")
    )
    bodies = st.binary(max_size=200) | st.text(max_size=50).map(str.encode) | VALUES.map(json.dumps).map(str.encode)

    @settings(max_examples=RAW, **few)
    @given(st.sampled_from(("GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH")), places, bodies, kinds)
    def asked(method: str, path: str, body: bytes, kind: str) -> None:
        self = client.connection
        self.request(method, path, body, {"Content-Type": kind})
        response = self.getresponse()
        response.read()
        assert response.status < 500
        client.statuses[response.status] = client.statuses.get(response.status, 0) + 1

    client.statuses.clear()
    asked()
    assert sum(client.statuses.values()) >= RAW
