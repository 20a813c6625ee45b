"""OpenAI's chat completions over HTTP: the official client, what is refused, and what a server holds out."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest

pytest.importorskip("starlette", reason="needs whet[serve]")
openai = pytest.importorskip("openai", reason="the official client is in the dev extra")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is in the dev extra")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from whet.cli.app import main  # noqa: E402
from whet.config import CreateConfig, ModelConfig, SamplingConfig, TrainConfig  # noqa: E402
from whet.errors import ConfigError, MissingExtra, ModelError  # noqa: E402
from whet.launch.serve import ServedModels, open_server  # noqa: E402
from whet.launch.world import LocalWorld  # noqa: E402
from whet.models.create import byte_tokenizer  # noqa: E402
from whet.models.locate import TEMPLATES  # noqa: E402
from whet.pipeline.stage import Policy  # noqa: E402
from whet.records import Completion  # noqa: E402
from whet.sampling.base import Request, SamplingParams  # noqa: E402
from whet.sampling.scripted import ScriptedSampler  # noqa: E402
from whet.sampling.tickets import SamplingKind  # noqa: E402
from whet.serving.app import Bounds, Server, beside, listen  # noqa: E402
from whet.serving.base import ChatAnswer, ChatChoice, Heard  # noqa: E402
from whet.serving.wire import ChatBody  # noqa: E402
from whet.templates.jinja import JinjaTemplate  # noqa: E402

KEY = "secret"
TEMPLATE = JinjaTemplate(byte_tokenizer(), chat_template=TEMPLATES["whet:hermes"].read_text())
LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}},
}
ASK: Any = [{"role": "user", "content": "Go."}]
BODY = {"model": "scripted", "messages": ASK}


def scripted(says: Sequence[str] | Callable[..., str]) -> Policy:
    sampler = ScriptedSampler(cast(Any, says), encode=TEMPLATE._encoder.one, decode=TEMPLATE.decode)
    return Policy(
        template=TEMPLATE,
        trainer=cast(Any, None),
        start_sampler=lambda: cast(Any, sampler),
        max_length=4000,
        about="",
        precision="float32",
    )


@pytest.fixture(scope="module")
def tiny() -> Policy:
    shape = CreateConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=16)
    model = ModelConfig(path="whet:tiny", create=shape)
    return LocalWorld().policy(model, TrainConfig(), SamplingConfig())


@pytest.fixture(scope="module")
def client(tiny: Policy) -> Iterator[Any]:
    """The official client, and a server of two models with a key."""

    def says(conversation: Any) -> str:
        asked = conversation[-1].content.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        calls = {"one": "I look.\n" + call("a"), "two": call("a") + call("b"), "broken": call("a") + "<tool_call>{"}
        return next((said for word, said in calls.items() if word in asked), "I saw " + asked[:20])

    models = ServedModels({"tiny": tiny, "scripted": scripted(says)}, key=KEY, max_tokens=300)
    with beside(Server(host=models)) as url, openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as opened:
        yield opened


def call(key: str) -> str:
    return f'<tool_call>{{"name": "look", "arguments": {{"key": "{key}"}}}}</tool_call>'


# ------------------------------------------------------------------------------------- the official client


def test_plain_completions_are_reproducible_by_their_seed(client: Any) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12, **more)

    first, again, other = ask(seed=1), ask(seed=1), ask(seed=2)
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
    assert first.choices[0].finish_reason in ("length", "stop") and first.model == "tiny"
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens > 0
    assert ask(temperature=0).choices[0].message.content == ask(temperature=0, seed=5).choices[0].message.content
    two = ask(seed=1, n=2)
    assert two.choices[0].message.content == first.choices[0].message.content != two.choices[1].message.content
    assert [choice.index for choice in two.choices] == [0, 1]
    assert len(ask(max_completion_tokens=3, logprobs=True).choices[0].logprobs.content) <= 12
    assert client.models.list().data[1].id == "scripted" and client.models.retrieve("tiny").id == "tiny"


def test_a_stream_says_what_the_whole_answer_says_while_it_is_written(client: Any) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12, seed=3, n=2, **more)

    whole, said, endings, pieces = ask(), ["", ""], ["", ""], 0
    usage = None
    for chunk in ask(stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            endings[choice.index] = choice.finish_reason or endings[choice.index]
            pieces += bool(choice.delta.content)
    assert said == [choice.message.content for choice in whole.choices]
    assert endings == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and pieces > 4


def test_a_stop_string_ends_the_answer_and_is_left_out(client: Any) -> None:
    def ask(**more: Any) -> str:
        answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12, seed=1, **more)
        return str(answer.choices[0].message.content)

    stop = ask()[4:6]
    assert ask(stop=stop) == ask().partition(stop)[0]
    whole = client.chat.completions.create(model="scripted", messages=ASK).choices[0]
    cut = client.chat.completions.create(model="scripted", messages=ASK, stop=["aw", "zz"], stream=True)
    assert whole.message.content == "I saw Go."
    assert "".join(chunk.choices[0].delta.content or "" for chunk in cut) == "I s"


def test_tools_are_called_and_their_results_are_read(client: Any) -> None:
    def ask(*messages: Any, **more: Any) -> Any:
        return client.chat.completions.create(model="scripted", messages=list(messages), tools=[LOOK], **more)

    asked = {"role": "user", "content": "two"}
    answer = ask(asked).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    calls = answer.message.tool_calls
    assert [json.loads(each.function.arguments) for each in calls] == [{"key": "a"}, {"key": "b"}]
    results = [{"role": "tool", "tool_call_id": each.id, "content": f"saw {n}"} for n, each in enumerate(calls)]
    assert ask(asked, answer.message, *results).choices[0].message.content == "I saw <tool_response>\nsaw "
    streamed = [c for chunk in ask(asked, stream=True) for c in chunk.choices[0].delta.tool_calls or ()]
    assert [each.function.arguments for each in streamed] == [each.function.arguments for each in calls]
    assert ask({"role": "user", "content": "one"}).choices[0].message.content == "I look."
    broken = ask({"role": "user", "content": "broken"}).choices[0]
    assert broken.message.content == call("a") + "<tool_call>{" and not broken.message.tool_calls
    assert ask(asked, tool_choice="none").choices[0].message.content == call("a") + call("b")


def test_a_call_inside_an_answer_ends_it_and_the_same_answer_goes_on_behind_the_result() -> None:
    template = JinjaTemplate(byte_tokenizer(), chat_template=TEMPLATES["whet:inline"].read_text())
    sampler = ScriptedSampler(
        lambda asked: "b" if "<information>b" in asked[-1].content else "hm <look>a</look> no",
        encode=template._encoder.one,
        decode=template.decode,
    )
    policy = replace(scripted([]), template=template, start_sampler=lambda: cast(Any, sampler))
    with (
        beside(Server(host=ServedModels({"inline": policy}))) as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0) as opened,
    ):
        ask = partial(opened.chat.completions.create, model="inline", tools=cast(Any, [LOOK]))
        answer = ask(messages=ASK).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content == "hm"
        (called,) = answer.message.tool_calls
        assert json.loads(called.function.arguments) == {"key": "a"}
        result = {"role": "tool", "tool_call_id": called.id, "content": "b"}
        assert ask(messages=[*ASK, answer.message, result]).choices[0].message.content == "b"


def test_log_probabilities_are_those_of_the_tokens(client: Any, tiny: Policy) -> None:
    choice = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5, seed=1, logprobs=True).choices[0]
    listed = choice.logprobs.content
    assert "".join(each.token for each in listed).startswith(choice.message.content[:1])
    assert all(each.logprob < 0 for each in listed) and len(listed) <= 5


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "there is tiny, scripted"),
        ({"model": "../../etc/passwd"}, openai.NotFoundError, "no model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"tool_choice": "required", "tools": [LOOK]}, openai.BadRequestError, "tool_choice"),
        ({"extra_body": {"tempratur": 1}}, openai.BadRequestError, "tempratur: this server does not know it"),
        ({"model": "tiny", "tools": [LOOK]}, openai.BadRequestError, "tools"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "5,0"),
        ({"extra_headers": {"Authorization": "Bearer wrong"}}, openai.AuthenticationError, "API key"),
    ],
)
def test_what_is_not_done_here_is_refused(client: Any, more: Mapping[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "scripted", "messages": ASK, **more})
    assert says in raised.value.body["message"] and "\n" not in raised.value.body["message"]


# ------------------------------------------------------------------------------------ without a network


class Slow:
    """A host whose one model answers when it is told to."""

    models = ("slow",)

    def __init__(self) -> None:
        self.go, self.cancelled = asyncio.Event(), 0

    def caller(self, key: str) -> Slow:
        return self

    async def answer(self, asked: ChatBody, heard: Heard) -> ChatAnswer:
        try:
            heard(0, "begun")
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return ChatAnswer(choices=(ChatChoice(content="begun and done"),))


async def send(app: Any, body: bytes, *, path: str = "/v1/chat/completions", stays: bool = True, **headers: str) -> Any:
    """(status, what came back) of a request that is written at once, by a client that stays or leaves."""
    sent: list[Any] = []
    bodies = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        with suppress(StopIteration):
            return next(bodies)
        await asyncio.sleep(60 if stays else 0.01)
        return {"type": "http.disconnect"}

    async def collect(message: Any) -> None:
        sent.append(message)

    named = {"content_type": "application/json", "host": "localhost:1"} | headers
    scope = {
        "type": "http",
        "method": "POST" if path.endswith("completions") else "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()],
    }
    await app(scope, receive, collect)
    return (sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])) if sent else (None, b"")


SLOW = json.dumps({"model": "slow", "messages": ASK}).encode()
STREAM = json.dumps({"model": "slow", "messages": ASK, "stream": True}).encode()


def test_overload_is_answered_429_and_who_leaves_frees_a_place() -> None:
    async def story() -> None:
        host = Slow()
        server = Server(host=host, bounds=Bounds(concurrency=2, answer_s=5.0))
        app = server.app()
        staying = [asyncio.create_task(send(app, SLOW)), asyncio.create_task(send(app, STREAM))]
        await asyncio.sleep(0.02)
        status, body = await send(app, SLOW)
        assert status == 429 and json.loads(body)["error"]["type"] == "rate_limit_error"
        assert (await send(app, b"", path="/health"))[0] == 200
        host.go.set()
        (status, body), (_, events) = await asyncio.gather(*staying)
        assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "begun and done"
        assert (
            b'"content": "begun"' in events and b'"content": " and done"' in events and events.endswith(b"[DONE]\n\n")
        )
        host.go.clear()
        assert await send(app, SLOW, stays=False) == (None, b"")
        assert (await send(app, STREAM, stays=False))[0] == 200
        assert (host.cancelled, server.busy) == (2, 0)

    asyncio.run(story())


def test_bodies_and_waits_are_bounded() -> None:
    async def story() -> None:
        app = Server(host=Slow(), bounds=Bounds(body_bytes=1000, answer_s=0.05, body_s=0.05)).app()
        assert (await send(app, b" " * 1001))[0] == 413
        assert (await send(app, SLOW))[0] == 504
        status, events = await send(app, STREAM)
        assert status == 200 and b"no answer in 0.05 s" in events
        assert (await send(app, SLOW, content_type="text/plain"))[0] == 415

        async def silent() -> Any:
            await asyncio.sleep(60)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        scope["headers"] = [(b"content-type", b"application/json")]
        sent: list[Any] = []

        async def collect(message: Any) -> None:
            sent.append(message)

        await app(scope, silent, collect)
        assert sent[0]["status"] == 408

    asyncio.run(story())


def test_a_connection_without_a_whole_head_does_not_keep_its_place() -> None:
    part, whole = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with beside(Server(host=Slow(), bounds=Bounds(body_s=0.3))) as url:
        address = ("127.0.0.1", int(url.split(":")[2].removesuffix("/v1")))
        for begins in ((), (part,), (whole, part)):
            with socket.create_connection(address, timeout=3) as held:
                for sent in begins:
                    held.sendall(sent)
                    time.sleep(0.1)
                answers = b"".join(iter(lambda: held.recv(1000), b""))
                assert answers.count(b"200 OK") == begins.count(whole)


def test_a_page_in_a_browser_does_not_reach_a_server_without_a_key() -> None:
    async def story() -> None:
        app = Server(host=Slow(), names=frozenset({"localhost"})).app()
        assert (await send(app, SLOW, host="evil.example:80"))[0] == 403
        assert (await send(app, b"", path="/v1/models"))[0] == 200

    asyncio.run(story())


def test_no_model_name_reaches_the_file_system() -> None:
    async def story() -> None:
        app = Server(host=ServedModels({"scripted": scripted(lambda _: "x")})).app()
        for name in (
            "../scripted",
            "/etc/passwd",
            "scripted/../x",
            "scripted\0",
            "%2e%2e/x",
            "whet:demo",
            "",
            "x" * 9999,
        ):
            body = json.dumps({**BODY, "model": name}).encode()
            assert (await send(app, body))[0] in (400, 404), name
            assert (await send(app, b"", path=f"/v1/models/{name}"))[0] == 404, name

    asyncio.run(story())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "", "a" * 70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
GOOD: dict[str, Any] = {
    **BODY,
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Go."}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": '{"key": "a"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "saw"},
    ],
    "tools": [LOOK],
    "tool_choice": "auto",
    "stop": ["x"],
    "n": 2,
    "seed": 1,
    "top_p": 0.5,
    "max_tokens": 5,
    "stream": False,
    "chat_template_kwargs": {},
}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = put(copy[at[0]], at[1:], new)
    return copy


MALFORMED = st.binary(max_size=40) | st.builds(
    lambda changes: json.dumps(_changed(changes)).encode(errors="surrogatepass"),
    st.lists(st.tuples(st.sampled_from(sorted(places(GOOD), key=str)), JSON), min_size=1, max_size=2),
)


def _changed(changes: Sequence[tuple[tuple[Any, ...], Any]]) -> Any:
    value: Any = GOOD
    for at, new in changes:
        with suppress(KeyError, IndexError, TypeError):
            value = put(value, at, new)
    return value


def fuzz(examples: int) -> None:
    """Requests that are wrong somewhere: each is answered, none by a failure, and the next good one as ever."""
    models = ServedModels({"scripted": scripted(lambda _: call("a"))})
    app, loop = Server(host=models).app(), asyncio.new_event_loop()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(MALFORMED)
    def each(body: bytes) -> None:
        status, answer = loop.run_until_complete(send(app, body))
        assert status == 200 or 400 <= status < 500, (status, body, answer)
        assert status == 200 or set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}

    each()
    status, answer = loop.run_until_complete(send(app, json.dumps(GOOD).encode()))
    assert status == 200 and len(json.loads(answer)["choices"]) == 2
    loop.close()


def test_malformed_requests_are_refused_and_the_server_goes_on() -> None:
    fuzz(300)


# --------------------------------------------------------------------------------------- the engine's side


class Counting:
    """A sampler that never ends, and counts who gave up."""

    version, given_up = 0, 0

    async def sample(self, request: Request) -> Completion:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            Counting.given_up += 1
            raise
        raise AssertionError


def test_who_leaves_is_cancelled_in_the_sampler() -> None:
    async def story() -> None:
        policy = scripted([])
        waits = Policy(**{**{n: getattr(policy, n) for n in policy.__slots__}, "start_sampler": Counting})
        app = Server(host=ServedModels({"scripted": waits}), bounds=Bounds(answer_s=5.0)).app()
        assert await send(app, json.dumps({**BODY, "n": 3}).encode(), stays=False) == (None, b"")
        for _ in range(100):
            await asyncio.sleep(0.01)
            if Counting.given_up == 3:
                return
        raise AssertionError(Counting.given_up)

    asyncio.run(story())


def test_a_server_for_other_machines_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"max_tokens": 5, "bounds": Bounds()}
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="without a key"):
            open_server([], host=host, key_env=None, **how)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        open_server([], host="127.0.0.1", key_env="NO_SUCH_KEY", **how)
    monkeypatch.setenv("SOME_KEY", KEY)
    server, _ = open_server([], host="0.0.0.0", key_env="SOME_KEY", **how)
    assert server.host.caller(KEY) and not server.host.caller("") and not server.host.caller("sécret")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be listened on"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_the_command_says_where_it_serves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ports: list[int] = []

    class Ends:
        def run(self, sockets: list[socket.socket]) -> None:
            ports.append(sockets[0].getsockname()[1])

    monkeypatch.setattr("whet.serving.app.runner", lambda server: Ends())
    with pytest.raises(SystemExit) as ended:
        main(["serve", "demo=whet:demo", "--port", "0", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said == {"ok": True, "url": f"http://127.0.0.1:{ports[0]}/v1", "models": ["demo"]}
    assert ended.value.code == 0


def test_the_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'whet\[serve\]'"):
        Server(host=Slow()).app()


def test_a_request_that_cannot_be_taken_in_leaves_nothing_behind(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that held its prompt would be at work for ever."""

    def refuse(*_: Any) -> Any:
        raise ModelError("no such string")

    engine = cast(Any, tiny.sampler).engine
    monkeypatch.setattr(SamplingKind, "of", refuse)
    with pytest.raises(ModelError):
        engine.submit(Request(prompt=[1, 2], seed=0, params=SamplingParams(max_tokens=2)))
    assert not engine.busy
