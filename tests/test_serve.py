"""The server before a generator without a model, by real sockets: OpenAI's client, the queue, keys, refusals."""

import asyncio
import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import chain
from typing import Any

import httpx
import openai
import pytest
import transformers
from serving import NAME, Running, byte_tokenizer, running

from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.generation.answer import TokenLogprob
from tiercache.generation.chat_template import templated
from tiercache.serve import connection
from tiercache.serve.listener import Listener
from tiercache.serve.logprobs import LogprobWriter
from tiercache.serve.queue import GenerationQueue
from tiercache.serve.refusal import RefusalError
from tiercache.serve.runner import bind
from tiercache.serve.schema import HARMLESS, OF_CHAT, OF_COMPLETIONS
from tiercache.serve.security import KEY_VARIABLE, AccessPolicy
from tiercache.serve.served import Defaults

TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Running]:
    with running(tokenizer) as found:
        yield found


@pytest.fixture
def slow(tokenizer: Any) -> Iterator[Running]:
    """Fifty layers a second, one request waits at most."""
    with running(tokenizer, layer_s=0.02, waiting=1, heartbeat_s=0.05) as found:
        yield found


def client(server: Running, key: str = "any") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30)


def http(method: str, url: str, **options: Any) -> httpx.Response:
    return httpx.request(method, url, timeout=30, verify=False, **options)  # reading certificates takes a while


def post(server: Running, path: str, body: Any) -> httpx.Response:
    return http("post", f"{server.url}{path}", json=body)


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": TALK, "max_tokens": 8, **fields}


def error(response: httpx.Response) -> dict[str, Any]:
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def soon(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("more", [{}, {"seed": 3, "temperature": 1.0}, {"stop": ["qz", "u"]}, {"max_tokens": 1}])
def test_a_streamed_chat_is_the_whole_one(server: Running, tokenizer: Any, more: dict[str, Any]) -> None:
    asked = {"model": NAME, "messages": TALK, "max_tokens": 40, "logprobs": True, "top_logprobs": 2, **more}
    whole = client(server).chat.completions.create(**asked)
    stream = list(client(server).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *chunks, last = stream
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == whole.choices[0].message.role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    logprobs = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert logprobs == whole.choices[0].logprobs.content
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)
    assert whole.usage.completion_tokens == len(logprobs)  # one for each token, that which ends the text included
    template = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)
    assert whole.usage.prompt_tokens == len(template["input_ids"])
    statistics = set(whole.tiercache)
    assert statistics == set(last.tiercache) > {"tiers", "ssd_bytes", "drafting", "tokens_per_s"}
    assert {chunk.id for chunk in stream} != {whole.id}


def test_a_streamed_completion_is_the_whole_one(server: Running) -> None:
    asked = {"model": NAME, "prompt": ["abc", "hello there"], "max_tokens": 9, "logprobs": 1, "echo": True}
    whole = client(server).completions.create(**asked)
    stream = list(client(server).completions.create(**asked, stream=True))
    for number, prompt in enumerate(asked["prompt"]):
        parts = [chunk.choices[0] for chunk in stream if chunk.choices[0].index == number]
        choice = whole.choices[number]
        assert "".join(part.text for part in parts) == choice.text
        assert choice.text.startswith(prompt)
        assert parts[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            pieces = [getattr(part.logprobs, name) for part in parts if part.logprobs is not None]
            assert list(chain(*pieces)) == getattr(choice.logprobs, name)
        assert "".join(choice.logprobs.tokens).removesuffix("<eos>") == choice.text
        assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
    assert [hasattr(chunk, "tiercache") for chunk in stream] == [False] * (len(stream) - 1) + [True]


def test_the_prompt_alone_is_scored(server: Running) -> None:
    body = {"prompt": [40, 41, 42], "echo": True, "logprobs": 2, "max_tokens": 0}
    found = post(server, "/v1/completions", body).json()
    logprobs = found["choices"][0]["logprobs"]
    wanted = [server.generator.logprob([40, 41, 42][:place], 40 + place, 2).logprob for place in (1, 2)]
    assert logprobs["token_logprobs"] == [None, *wanted]
    assert [len(top) for top in logprobs["top_logprobs"][1:]] == [3, 3]  # the two likeliest and the token itself
    assert found["usage"]["completion_tokens"] == 0


def test_text_ends_before_a_stop_string(server: Running) -> None:
    whole = client(server).completions.create(model=NAME, prompt="abc", max_tokens=30).choices[0].text
    stop = whole[5:8]
    found = client(server).completions.create(model=NAME, prompt="abc", max_tokens=30, stop=stop)
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == whole.index(stop) + len(stop)


def test_sampling_of_the_checkpoint_where_a_request_says_nothing(tokenizer: Any) -> None:
    with running(tokenizer, defaults=Defaults(temperature=1.0)) as found:
        said = [post(found, "/v1/chat/completions", chat(seed=5, **more)).json() for more in ({}, {"temperature": 0})]
    texts = [answer["choices"][0]["message"]["content"] for answer in said]
    assert texts[0] != texts[1]


def test_a_checkpoint_that_samples_does_so_as_transformers_would() -> None:
    said = Defaults.of_checkpoint(transformers.GenerationConfig(do_sample=True, temperature=0.6))
    assert said == Defaults(temperature=0.6, top_p=1.0, top_k=50)
    assert Defaults.of_checkpoint(transformers.GenerationConfig(do_sample=True, top_k=0)).top_k == 0
    assert Defaults.of_checkpoint(transformers.GenerationConfig()) == Defaults()


def test_the_text_of_a_token_is_asked_for_once_and_never_in_the_event_loop(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, asked, in_loop = tokenizer.decode, [], []

    def watched(tokens: Any, **options: Any) -> Any:
        asked.append(tokens)
        with suppress(RuntimeError):  # of another thread
            in_loop.append(asyncio.get_running_loop())
        return decode(tokens, **options)

    monkeypatch.setattr(tokenizer, "decode", watched)
    found = [TokenLogprob(token % 5, -1.0, ((token % 3, -2.0), (7, -3.0))) for token in range(100)]
    writer = LogprobWriter(tokenizer)
    assert writer.completion(found, 0) == writer.completion(found, 0)
    assert len(asked) == 6
    with running(tokenizer) as server:
        for stream in (False, True):
            body = {"prompt": "abc", "max_tokens": 4, "echo": True, "logprobs": 3, "stream": stream}
            assert post(server, "/v1/completions", body).status_code == 200
    assert not in_loop


def test_turns_of_a_chat_keep_the_cache(server: Running) -> None:
    first = post(server, "/v1/chat/completions", chat()).json()
    answer = first["choices"][0]["message"]  # as the server said it, `refusal` included
    again = [*TALK, answer, {"role": "user", "content": "go on"}]
    second = post(server, "/v1/chat/completions", chat(messages=again)).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]


def test_one_answers_one_waits_and_a_third_is_told_to_come_back(slow: Running) -> None:
    with ThreadPoolExecutor(2) as threads:
        two = [threads.submit(post, slow, "/v1/chat/completions", chat(max_tokens=6)) for _ in range(2)]
        soon(lambda: http("get", f"{slow.url}/health").json()["waiting"] == 1)
        third = post(slow, "/v1/chat/completions", chat())
        assert third.status_code == 429
        assert int(third.headers["Retry-After"]) >= 1
        assert error(third)["code"] == "queue_full"
        unread = {"content": b"no JSON", "headers": {"Content-Type": "application/json"}}
        assert http("post", f"{slow.url}/v1/completions", **unread).status_code == 429  # before it is looked at
        answers = [one.result() for one in two]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert max(answer.json()["tiercache"]["queue_s"] for answer in answers) > 0.2
    assert post(slow, "/v1/chat/completions", chat(max_tokens=1)).status_code == 200


def raw(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(text)}\r\n"
    made = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    made.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + text)
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_is_answered_no_further(slow: Running, stream: bool) -> None:
    gone = raw(slow, chat(max_tokens=200, stream=stream))  # 16 seconds
    soon(lambda: slow.generator.passes > 2)
    waits = raw(slow, chat(max_tokens=200, stream=stream))
    soon(lambda: slow.server.queue.waiting == 1)
    waits.close()
    soon(lambda: slow.server.queue.waiting == 0)
    assert slow.server.queue.running == 1
    gone.close()
    soon(lambda: slow.server.queue.running == 0, seconds=1)
    assert slow.generator.passes < 100
    assert post(slow, "/v1/chat/completions", chat(max_tokens=1)).status_code == 200


def test_a_stream_that_is_broken_off_is_counted(slow: Running) -> None:
    gone = raw(slow, chat(max_tokens=200, stream=True))
    soon(lambda: slow.generator.passes > 2)
    gone.close()
    soon(lambda: 'answers_total{finish_reason="cancelled"} 1.0' in http("get", f"{slow.url}/metrics").text)


def test_each_prompt_of_a_stream_ends_when_it_ends(tokenizer: Any) -> None:
    body = {"prompt": ["abc", "hello"], "max_tokens": 2, "stream": True}
    with running(tokenizer, layer_s=0.05, heartbeat_s=0.02) as found:
        lines = post(found, "/v1/completions", body).text.split("\n\n")
    ends = [number for number, line in enumerate(lines) if '"finish_reason": "length"' in line]
    assert len(ends) == 2
    assert lines[ends[0] + 1].startswith(": prefill")  # of the second prompt


def test_a_request_that_is_given_up_in_the_line_leaves_nothing() -> None:
    class Work:
        def __call__(self, job: Any) -> None:
            entered.set()
            done.wait(10)

    async def given_up() -> None:
        queue = GenerationQueue(2)
        running_one = queue.submit(Work())
        entered.wait(10)
        work = Work()
        left, waits = weakref.ref(work), queue.submit(work)
        del work
        queue.cancel(waits)
        assert [event async for event in waits.events(1)] == []
        gc.collect()
        assert left() is None  # while the other runs still
        assert queue.running == 1
        done.set()
        assert [event async for event in running_one.events(1)] == []
        queue.join()

    entered, done = threading.Event(), threading.Event()
    asyncio.run(given_up())


def test_silent_connections_give_way_and_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS", 4)
    monkeypatch.setattr(connection, "IDLE_S", 1.0)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(tokenizer, layer_s=0.02) as found, ExitStack() as opened:

        def connected() -> socket.socket:
            port = int(found.url.rpartition(":")[2])
            return opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))

        busy = opened.enter_context(raw(found, chat(max_tokens=20)))  # longer than a connection may be silent
        soon(lambda: found.generator.passes > 0)
        silent = [connected() for _ in range(8)]
        assert http("get", f"{found.url}/health").json()["running"] == 1
        stuck = connected()
        stuck.sendall(head + b"Content-Length: 9\r\n\r\n{")  # a request that never becomes whole
        assert [one.recv(1) for one in (*silent, stuck)] == [b""] * 9
        busy.settimeout(10)
        assert busy.recv(12) == b"HTTP/1.1 200"


def test_small_pieces_are_sent_at_once() -> None:
    """Nagle's algorithm would hold each token of a stream back until the client has acknowledged the last."""

    async def accepted() -> bool:
        found = asyncio.Queue[bool]()

        async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            found.put_nowait(bool(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        made = bind("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=made):
            with socket.create_connection(made.getsockname()):
                return await found.get()

    assert asyncio.run(accepted())


def test_a_stream_is_kept_alive(slow: Running) -> None:
    first = raw(slow, chat(max_tokens=200))
    soon(lambda: slow.generator.passes > 0)
    asked = {"json": chat(max_tokens=3, stream=True), "timeout": 30, "verify": False}
    with httpx.stream("POST", f"{slow.url}/v1/chat/completions", **asked) as answer:
        lines = answer.iter_lines()
        assert ": queued" in lines
        first.close()
        rest = list(lines)
    assert any(line.startswith(": prefill layer") for line in rest)
    assert rest[-2:] == ["data: [DONE]", ""]


def test_shutdown_tells_those_who_wait(slow: Running) -> None:
    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(post, slow, "/v1/chat/completions", chat(max_tokens=200, stream=True))
        soon(lambda: slow.generator.passes > 0)
        waits = threads.submit(post, slow, "/v1/chat/completions", chat())
        soon(lambda: slow.server.queue.waiting == 1)
        slow.listener.stop()
        assert error(waits.result())["code"] == "shutting_down"
        assert json.loads(runs.result().text.split("data: ")[-1])["error"]["code"] == "shutting_down"


@pytest.mark.parametrize(("path", "table"), [("/v1/chat/completions", OF_CHAT), ("/v1/completions", OF_COMPLETIONS)])
def test_what_cannot_be_done_is_refused_by_name(server: Running, path: str, table: dict[str, Any]) -> None:
    body = chat() if "chat" in path else {"prompt": "abc", "max_tokens": 2}
    for name, neutral in table.items():
        refused = post(server, path, {**body, name: {"something": "else"}})
        assert refused.status_code == 400
        assert (error(refused)["param"], error(refused)["code"]) == (name, "unsupported")
        assert name in error(refused)["message"]
        for value in (None, *neutral):
            assert post(server, path, {**body, name: value}).status_code == 200, (name, value)
    for name in HARMLESS:
        assert post(server, path, {**body, name: {"any": "thing"}}).status_code == 200
    unknown = error(post(server, path, {**body, "min_p": 0.1}))
    assert (unknown["param"], unknown["code"]) == ("min_p", "unknown_field")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(n=2), "n"),
        (chat(messages=[]), "messages"),
        (chat(messages=[{"role": "tool", "content": "x"}]), "messages.0.role"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages.0",
        ),
        (chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]), "messages.0.tool_calls"),
        (chat(messages=[*TALK, *TALK]), "messages"),  # the template's own refusal
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=257), "max_tokens"),
        (chat(max_tokens=3, max_completion_tokens=4), None),
        (chat(messages=[{"role": "user", "content": "x" * 600}]), "messages"),
        (chat(temperature=float("nan")), None),
        (chat(temperature=3), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(stop=""), "stop"),
        (chat(top_logprobs=2), None),
        (chat(stream_options={"include_usage": True}), None),
        (chat(seed=2**70), "seed"),
        (chat(stream="yes"), "stream"),
    ],
)
def test_chats_that_are_refused(server: Running, body: dict[str, Any], param: str | None) -> None:
    content = json.dumps(body)  # httpx would refuse NaN itself
    headers = {"Content-Type": "application/json"}
    found = http("post", f"{server.url}/v1/chat/completions", content=content, headers=headers)
    assert found.status_code == 400, found.text
    assert (error(found)["param"] or "").startswith(param or "")


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [1, 2.5], [True], ["a", 1], 5, {"a": 1}, None, [258], [-1], ["a"] * 65]
)
def test_prompts_that_are_refused(server: Running, prompt: Any) -> None:
    found = post(server, "/v1/completions", {"prompt": prompt})
    assert (found.status_code, error(found)["param"]) == (400, "prompt")


def test_other_models_paths_and_methods(server: Running) -> None:
    assert error(post(server, "/v1/chat/completions", chat(model="gpt-4")))["code"] == "model_not_found"
    assert post(server, "/v1/embeddings", {}).status_code == 404
    assert http("get", f"{server.url}/v1/completions").status_code == 405
    assert [one.id for one in client(server).models.list()] == [NAME]
    assert client(server).models.retrieve(NAME).id == NAME
    text = httpx.post(
        f"{server.url}/v1/completions", content=json.dumps({"prompt": "a"}), headers={"Content-Type": "text/plain"}
    )
    assert text.status_code == 415  # what a page of another site could send without being asked


@pytest.mark.parametrize(
    ("content", "kind", "status", "told"),
    [
        (b'{"prompt": }', "application/json; charset=utf-8", 400, "Expecting value, at character 11"),
        (b"\xff", "application/json", 400, "send one JSON object"),
        (b"", "application/json", 400, "the body is empty; send one JSON object"),
        (b'{"prompt": "x"}', "text/plain", 415, "Content-Type: application/json"),
        (b'{"prompt": "x"}', None, 415, "Content-Type: application/json"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_how_to_be(
    server: Running, content: bytes, kind: str | None, status: int, told: str
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    found = http("post", f"{server.url}/v1/completions", content=content, headers=headers)
    assert found.status_code == status
    assert told in error(found)["message"]
    assert error(found)["param"] is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b"9" * 9000, b"[" * 9000]
)
def test_bodies_that_are_no_request(server: Running, content: bytes) -> None:
    found = http("post", f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert error(found)


def test_a_body_that_is_too_long(tokenizer: Any) -> None:
    with running(tokenizer, max_body=1024) as found:
        assert post(found, "/v1/completions", {"prompt": "x" * 2000}).status_code == 413
        json_ones = {"Content-Type": "application/json"}
        content = (b"x" * 100 for _ in range(50))
        pieces = http("post", f"{found.url}/v1/completions", content=content, headers=json_ones)
        assert (pieces.status_code, error(pieces)["code"]) == (413, "too_large")
        assert post(found, "/v1/completions", {"prompt": "x"}).status_code == 200


def test_the_key(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "right-key")
    with running(tokenizer) as found:
        assert client(found, "right-key").models.list().data
        for wrong in ("right-kez", "right-ke", "right-key2"):
            with pytest.raises(openai.AuthenticationError):
                client(found, wrong).models.list()
        for path in ("/v1/models", "/metrics", "/stats", "/openapi.json"):
            assert http("get", f"{found.url}{path}").status_code == 401
        assert [http("get", f"{found.url}{path}").status_code for path in ("/", "/health")] == [200, 200]


@pytest.mark.parametrize("key", [None, "", " ", "schlüssel"])
def test_other_machines_need_a_key(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UsageError, match=KEY_VARIABLE):
        Listener("0.0.0.0", 0)


def test_an_address_that_is_taken(server: Running) -> None:
    with pytest.raises(EnvironmentUnsupportedError, match="--port"):
        Listener("127.0.0.1", int(server.url.rpartition(":")[2]))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1", "Host": "localhost:1"}, 200),
    ],
)
def test_pages_of_other_sites_are_turned_away(server: Running, headers: dict[str, str], status: int) -> None:
    assert http("get", f"{server.url}/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize("name", ["Example.com", "example.com", "example.COM:8443", "[2001:DB8::1]:80", "2001:db8::1"])
def test_names_that_are_allowed(name: str) -> None:
    access = AccessPolicy("127.0.0.1", None, (name,))
    host = "[2001:db8::1]" if "2001" in name else "example.com"
    for header in (host, f"{host}:8443"):
        access.check("/stats", {"host": header})
    with pytest.raises(RefusalError, match="--allow-host"):
        access.check("/stats", {"host": "example.org"})


def test_a_template_may_refuse_by_any_error(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content + 1 }}")
    with pytest.raises(UsageError, match="messages of user: can only concatenate str"):
        templated(tokenizer, TALK)


def test_each_answer_has_a_number(server: Running) -> None:
    said = [
        http("get", f"{server.url}/health", headers={"X-Request-Id": given}) for given in ("my-1", "no good", "x" * 200)
    ]
    numbers = [answer.headers["X-Request-Id"] for answer in said]
    assert numbers[0] == "my-1"
    assert all(len(number) == 32 for number in numbers[1:])


def test_a_failure_tells_the_log_and_not_the_client(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(server.generator, "generate", fail)
        found = post(server, "/v1/chat/completions", chat())
        streamed = post(server, "/v1/chat/completions", chat(stream=True))
    assert (found.status_code, error(found)["code"]) == (500, "internal_error")
    assert '"internal_error"' in streamed.text
    assert "secret" not in found.text + streamed.text
    assert post(server, "/v1/chat/completions", chat()).status_code == 200


def test_metrics(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families as parse

    def samples() -> dict[tuple[str, str], float]:
        text = http("get", f"{server.url}/metrics").text
        return {
            (sample.name, sample.labels.get("tier", "")): sample.value
            for family in parse(text)
            for sample in family.samples
        }

    before = samples()
    usage = post(server, "/v1/chat/completions", chat()).json()["usage"]
    after = samples()
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert gained["tiercache_generated_tokens_total", ""] == usage["completion_tokens"]
    assert gained["tiercache_prompt_tokens_total", ""] == usage["prompt_tokens"]
    assert gained["tiercache_tier_hit_bytes_total", "dram"] == 10 * usage["completion_tokens"]
    assert gained["tiercache_draft_accepted_total", ""] > 0
    assert {name for name, _ in after} > {
        "tiercache_actual_pass_seconds",
        "tiercache_ssd_bytes_total",
        "tiercache_waiting_requests",
    }


def test_the_log_shows_no_letters_of_a_prompt(server: Running) -> None:
    post(server, "/v1/completions?secret", {"prompt": "secret", "max_tokens": 1})
    assert server.lines[-1][:3] == ("POST", "/v1/completions", 200)
    assert "secret" not in str(server.lines)


def own_threads() -> int:
    """Those beside AnyIO's pool, whose workers wait for more work and are as many as a busy machine needs."""
    return sum(thread.name != "AnyIO worker thread" for thread in threading.enumerate())


def test_many_at_once_are_all_answered(tokenizer: Any) -> None:
    before = own_threads()
    with running(tokenizer, waiting=40) as found, ThreadPoolExecutor(16) as threads:
        bodies = [{"prompt": f"prompt {number}", "max_tokens": 12, "stream": number % 2 == 0} for number in range(40)]
        answers = list(threads.map(lambda body: post(found, "/v1/completions", body), bodies))
        for body, answer in zip(bodies, answers, strict=True):
            alone = post(found, "/v1/completions", {**body, "stream": False}).json()["choices"][0]["text"]
            if body["stream"]:
                events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
                assert "".join(event["choices"][0]["text"] for event in events) == alone
            else:
                assert answer.json()["choices"][0]["text"] == alone
    assert own_threads() <= before
