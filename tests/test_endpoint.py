"""Endpoints misbehave: a loopback server plays every fault, and the sampler retries, gives up or says who owes what."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from whet.errors import ConfigError, SamplerError
from whet.records import Ending, Message, Reply, ToolCall
from whet.sampling.base import Request, SamplingParams, run
from whet.sampling.calls import SILENT, Call, Caller, FailedCall, Patience, Unanswered
from whet.sampling.endpoint import EndpointSampler
from whet.sampling.scripted import ScriptedSampler

Answer = Callable[["_Handler"], None]
PARAMS = SamplingParams(max_tokens=7, temperature=0.5)
NONE: Mapping[str, str] = {}
ASK = [[Message(role="user", content="2+2?")]]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class _Server(ThreadingHTTPServer):
    """Answers requests by the script, its last entry for all that follow."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, script: Sequence[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = list(script)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock, self.released = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    body: dict[str, Any]

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(self.body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = self.server.script[min(len(self.server.bodies), len(self.server.script)) - 1]
        answer(self)

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, text: str, *, headers: Mapping[str, str] = NONE, length: int = -1) -> None:
        self.send_response(status)
        data = text.encode()
        for name, value in {"content-length": str(len(data) if length < 0 else length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def says(content: str | None = "4", **fields: Any) -> Answer:
    text = json.dumps({"choices": [{"message": {"role": "assistant", "content": content, **fields}}]})
    return lambda handler: handler.reply(200, text)


def status(code: int, text: str = "", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.reply(code, text, headers=named)


def resets(handler: _Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def half(handler: _Handler) -> None:
    handler.reply(200, '{"choices": [{"mess', length=500)
    handler.close_connection = True


def not_json(handler: _Handler) -> None:
    handler.reply(200, '{"choices": [{"mess')


def hangs(handler: _Handler) -> None:
    handler.server.released.wait(20)


def drips(handler: _Handler) -> None:
    """A byte now and then: no single read is ever late, and the answer never comes."""
    handler.send_response(200)
    handler.send_header("content-length", "100000")
    handler.end_headers()
    while not handler.server.released.wait(0.02):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


@contextmanager
def serving(*script: Answer) -> Iterator[_Server]:
    server = _Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def sampler(url: str, **settings: Any) -> EndpointSampler:
    return EndpointSampler(url, "m", **{"first_wait_s": 0.01, "request_s": 10, "total_s": 15, **settings})


def chats(
    of: EndpointSampler, conversations: Sequence[Sequence[Message]], params: SamplingParams = PARAMS
) -> list[Message]:
    """The answers to conversations that are asked for together; the first failure is raised."""
    found = {}
    with closing(of.replies(conversations, params)) as replies:
        for number, reply in replies:
            if reply.message is None:
                raise SamplerError(reply.failure)
            found[number] = reply.message
    return [found[number] for number in range(len(conversations))]


def test_a_conversation_goes_there_and_back() -> None:
    call = ToolCall(name="add", arguments={"a": 2, "b": 2}, id="c1")
    conversation = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="2+2?"),
        Message(role="assistant", content="", thinking="secret", tool_calls=(call,)),
        Message(role="tool", content="4", tool_call_id="c1"),
    ]
    with serving(says()) as server:
        answers = chats(sampler(server.url), [conversation])
    assert answers == [Message(role="assistant", content="4")]
    (body,) = server.bodies
    messages = body.pop("messages")
    assert body == {"model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 1.0}
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert json.loads(messages[2]["tool_calls"][0]["function"]["arguments"]) == {"a": 2, "b": 2}
    assert messages[3]["tool_call_id"] == "c1"
    assert "secret" not in json.dumps(messages)


@pytest.mark.parametrize(
    ("given", "content", "thinking"),
    [
        (says("<think>two and two</think>\n\n4"), "4", "two and two"),
        (says("4", reasoning_content="two and two"), "4", "two and two"),
        (says("4", reasoning="two and two"), "4", "two and two"),
        (says("<think>cut off by the bud"), "", "cut off by the bud"),
        (says("no <think> at the start</think>"), "no <think> at the start</think>", None),
        (says("<think>quoted</think>", reasoning_content="own"), "<think>quoted</think>", "own"),
    ],
)
def test_thinking_is_apart_from_the_content(given: Answer, content: str, thinking: str | None) -> None:
    with serving(given) as server:
        assert chats(sampler(server.url), ASK) == [Message(role="assistant", content=content, thinking=thinking)]


def test_tool_calls_come_with_their_arguments() -> None:
    calls = [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    with serving(says(None, tool_calls=calls)) as server:
        (message,) = chats(sampler(server.url), ASK)
    assert message.content == ""
    assert message.tool_calls == (ToolCall(name="add", arguments={"a": 1}, id="x"),)


def test_a_server_that_fell_silent_is_not_asked_by_every_call() -> None:
    """A judge that was killed used to be found dead by each of thousands of questions, one wait after the other."""
    asked = [[Message(role="user", content=str(i))] for i in range(60)]

    def given(*script: Answer, attempts: int = 1) -> tuple[int, list[str]]:
        with serving(*script) as server:
            found = dict(sampler(server.url, concurrency=4, attempts=attempts).replies(asked, PARAMS))
        assert sorted(found) == list(range(60)) and all(reply.message is None for reply in found.values())
        return len(server.bodies), [found[number].failure for number in range(60)]

    made, said = given(status(503), attempts=2)
    assert 2 * SILENT <= made <= 2 * (SILENT + 3), "those that were under way, and no more"
    assert "attempt 2: 503" in said[0] and "no attempt is left" in said[0]
    assert re.search(
        r"conversation 60 of 60 was not asked for, because 1\d calls in a row had no answer.*503", said[-1]
    )
    made, said = given(status(400))
    assert made == 60, "a refusal is an answer: it is about one conversation, and says nothing of the others"
    made, _ = given(*[status(400) if i % 4 == 0 else status(503) for i in range(60)])
    assert made == 60, "not in a row"


def test_a_call_that_is_not_made_is_as_unanswered_as_those_before_it() -> None:
    """Whoever has several servers asks another one."""
    with serving(status(503)) as server:
        caller = Caller("S", Patience(attempts=1), concurrency=1)
        calls = [Call(server.url, {}, lambda response: response.text, "a word")] * (SILENT + 2)
        found = [answer.error for _, answer in caller.each(calls) if isinstance(answer, FailedCall)]
        assert len(server.bodies) == SILENT
    assert len(found) == len(calls) and {type(error) for error in found} == {Unanswered}


def test_every_conversation_gets_its_own_answer_and_few_are_under_way() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def echo(handler: _Handler) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        handler.server.released.wait(0.01)
        with lock:
            running -= 1
        says("re: " + handler.body["messages"][0]["content"])(handler)

    with serving(echo) as server:
        asked = [[Message(role="user", content=str(i))] for i in range(12)]
        answers = chats(sampler(server.url, concurrency=3), asked)
    assert [answer.content for answer in answers] == [f"re: {i}" for i in range(12)]
    assert most <= 3


@pytest.mark.parametrize("fault", [status(500), status(503, "warming up"), status(429), resets, half, not_json])
def test_what_may_get_better_is_tried_again(fault: Answer) -> None:
    with serving(fault, fault, says()) as server:
        assert chats(sampler(server.url), ASK)[0].content == "4"
        assert len(server.bodies) == 3


@pytest.mark.parametrize("fault", [hangs, drips])
def test_an_attempt_that_takes_too_long_is_given_up_and_repeated(fault: Answer) -> None:
    with serving(fault, says()) as server:
        assert chats(sampler(server.url, request_s=0.2), ASK)[0].content == "4"
        assert len(server.bodies) == 2


def test_attempts_are_counted_and_the_last_fault_is_named() -> None:
    with serving(status(503, "warming\n up")) as server, pytest.raises(SamplerError) as caught:
        chats(sampler(server.url, attempts=3), ASK)
    assert len(server.bodies) == 3
    said = str(caught.value)
    assert "attempt 3: 503 Service Unavailable (warming up)" in said
    assert "no attempt is left" in said
    assert "the answer to conversation 1 of 1 has been awaited for" in said


def test_nobody_listens() -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SamplerError, match=r"attempt 2: ConnectError"):
        chats(sampler(f"http://127.0.0.1:{port}/v1", attempts=2), ASK)


def test_an_address_that_is_none_is_not_tried_again() -> None:
    with pytest.raises(SamplerError, match=r"http://host:80a0/v1/chat/completions is no address: Invalid port"):
        chats(sampler("http://host:80a0/v1", first_wait_s=60), ASK)


@pytest.mark.parametrize("fault", [hangs, drips])
def test_the_deadline_of_the_call_names_what_is_awaited(fault: Answer) -> None:
    with serving(fault) as server, pytest.raises(SamplerError) as caught:
        chats(sampler(server.url, total_s=0.3), ASK * 2)
    assert "model m: the answer to conversation" in str(caught.value)
    assert "(deadline 0.3 s); no attempt has ended; the deadline is over" in str(caught.value)


def test_the_deadline_holds_for_those_who_wait_for_their_turn() -> None:
    with serving(hangs) as server, pytest.raises(SamplerError, match="the deadline is over"):
        chats(sampler(server.url, total_s=0.3, concurrency=1), ASK * 5)
    assert len(server.bodies) == 1


def http_date(hours: int) -> str:
    """So many hours from now, as a header states it; made inside a test: an id from the clock differs by worker."""
    return format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_and_never_beyond_the_deadline(form: str) -> None:
    after = "3600" if form == "seconds" else http_date(1)
    with serving(status(429, retry_after=after), says()) as server, pytest.raises(SamplerError) as caught:
        chats(sampler(server.url), ASK)
    assert len(server.bodies) == 1  # it neither came back early nor slept through its deadline
    assert "the next attempt would be in 3" in str(caught.value)


@pytest.mark.parametrize("form", ["0", "", "soon", "date"])
def test_a_retry_after_that_asks_for_nothing_is_no_obstacle(form: str) -> None:
    after = http_date(-1) if form == "date" else form
    with serving(status(503, retry_after=after), says()) as server:
        assert chats(sampler(server.url), ASK)[0].content == "4"


@pytest.mark.parametrize("code", [400, 401, 404])
def test_what_will_not_get_better_is_raised_at_once(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serving(status(code, "no such model")) as server, pytest.raises(SamplerError, match="no such model") as caught:
        chats(sampler(server.url, api_key_env="MY_KEY"), ASK)
    assert len(server.bodies) == 1
    assert server.headers[0]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value)
    assert ("check the key in MY_KEY" in str(caught.value)) == (code == 401)


@pytest.mark.parametrize(
    "text",
    [
        '{"error": {"message": "overloaded"}}',
        "[]",
        '{"choices": []}',
        '{"choices": [{"message": {"content": 5}}]}',
        '{"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}}]}',
        '{"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}}]}',
    ],
)
def test_an_answer_of_the_wrong_shape_is_an_error_with_an_excerpt(text: str) -> None:
    with serving(status(200, text)) as server, pytest.raises(SamplerError, match="is no chat completion") as caught:
        chats(sampler(server.url), ASK)
    assert len(server.bodies) == 1
    assert text[:10] in str(caught.value)


def test_one_failure_gives_up_the_rest() -> None:
    with serving(status(400, "bad"), hangs) as server, pytest.raises(SamplerError, match="bad"):
        chats(sampler(server.url), ASK * 4)
    assert not [thread for thread in threading.enumerate() if thread.name == "whet-endpoint"]


def test_replies_come_one_by_one_and_failures_are_among_them() -> None:
    def odd(handler: _Handler) -> None:
        number = int(handler.body["messages"][0]["content"])
        (says(str(number)) if number % 2 else status(404, "gone"))(handler)

    asks = [[Message(role="user", content=str(number))] for number in range(6)]
    with serving(odd) as server:
        found = dict(EndpointSampler(server.url, "m").replies(asks, PARAMS))
    assert sorted(found) == list(range(6))
    assert [found[n].message.content for n in (1, 3, 5)] == ["1", "3", "5"]  # type: ignore[union-attr]
    assert all(found[n].message is None and "404" in found[n].failure and not found[n].timed_out for n in (0, 2, 4))


@pytest.mark.parametrize(("why", "cut_off"), [("length", True), ("stop", False), ("tool_calls", False), (None, False)])
def test_a_reply_says_whether_it_was_cut_off(why: str | None, cut_off: bool) -> None:
    choice = {"message": {"role": "assistant", "content": "4, beca"}, "finish_reason": why}
    with serving(lambda handler: handler.reply(200, json.dumps({"choices": [choice]}))) as server:
        ((_, reply),) = EndpointSampler(server.url, "m").replies(ASK, PARAMS)
    assert reply == Reply(message=Message(role="assistant", content="4, beca"), cut_off=cut_off)


@pytest.mark.parametrize("limits", [{"total_s": 0.3}, {"request_s": 0.1, "attempts": 1}])
def test_a_reply_that_is_late_says_so(limits: dict[str, Any]) -> None:
    with serving(hangs) as server:
        ((number, reply),) = EndpointSampler(server.url, "m", **limits).replies(ASK, PARAMS)
        server.released.set()
    assert number == 0 and reply.message is None and reply.timed_out


def test_who_stops_listening_gives_up_the_rest() -> None:
    with serving(says("4"), hangs) as server:
        replies = EndpointSampler(server.url, "m").replies([ASK[0]] * 3, PARAMS)
        assert next(replies)[1].message is not None
        replies.close()
        server.released.set()


def test_requests_begin_evenly_spread() -> None:
    """600 a minute is one every 0.1 s: the last of five begins 0.4 s after the first, on any machine."""
    begun: list[float] = []

    def note(handler: _Handler) -> None:
        begun.append(time.monotonic())
        says("4")(handler)

    with serving(note) as server:
        chats(EndpointSampler(server.url, "m", requests_per_minute=600), [ASK[0]] * 5)
    assert begun[-1] - begun[0] > 0.35


def test_a_rate_limit_holds_all_who_have_not_begun() -> None:
    begun: list[float] = []

    def limited(handler: _Handler) -> None:
        begun.append(time.monotonic())
        (status(429, retry_after="1") if len(begun) == 1 else says("4"))(handler)

    with serving(limited) as server:
        chats(EndpointSampler(server.url, "m", concurrency=1, first_wait_s=0.01), [ASK[0]] * 2)
    assert len(begun) == 3 and begun[1] - begun[0] > 0.9


def test_it_may_be_called_from_inside_an_event_loop() -> None:
    async def inside(url: str) -> list[Message]:
        return chats(sampler(url), ASK)

    with serving(says()) as server:
        (answer,) = asyncio.run(inside(server.url))
    assert answer.content == "4"


def test_the_settings_are_checked_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(ConfigError, match="NOT_THERE is not set"):
        EndpointSampler("http://127.0.0.1/v1", "m", api_key_env="NOT_THERE")
    with pytest.raises(ConfigError, match="like https://host/v1"):
        EndpointSampler("host/v1", "m")
    with pytest.raises(ValueError, match="stop_ids"):
        chats(sampler("http://127.0.0.1/v1"), ASK, SamplingParams(max_tokens=1, stop_ids=frozenset({1})))


# ---------------------------------------------------------------------------------------------- scripted


def written(scripted: ScriptedSampler, prompt: str = "2+2?") -> str:
    request = Request(prompt=tuple(prompt.encode()), seed=0, params=SamplingParams(max_tokens=9))
    return bytes(run(scripted.sample(request)).tokens.tolist()).decode()


def test_a_script_of_texts_is_used_up_in_order() -> None:
    scripted = ScriptedSampler(["one", "two"])
    assert [written(scripted), written(scripted)] == ["one", "two"]
    with pytest.raises(SamplerError, match="has 2 answers"):
        written(scripted)


def test_a_script_may_be_a_function_of_the_conversation() -> None:
    scripted = ScriptedSampler(lambda conversation: conversation[-1].content.upper())
    assert written(scripted, "abc") == "ABC"


@pytest.mark.parametrize(
    ("budget", "tokens", "ending"),
    [
        (9, (72, 105, 0), Ending.STOP),
        (3, (72, 105, 0), Ending.STOP),
        (2, (72, 105), Ending.LENGTH),
        (1, (72,), Ending.LENGTH),
    ],
)
def test_as_tokens_the_answer_ends_by_a_stop_token_or_by_its_budget(
    budget: int, tokens: tuple[int, ...], ending: Ending
) -> None:
    scripted = ScriptedSampler(lambda conversation: "Hi" if conversation[0].content == "say hi" else "?", logprob=-0.5)
    scripted.publish(3)
    params = SamplingParams(max_tokens=budget, stop_ids=frozenset({1, 0}))
    completion = run(scripted.sample(Request(prompt=tuple(b"say hi"), seed=0, params=params)))
    assert (tuple(completion.tokens.tolist()), completion.ending, completion.version) == (tokens, ending, 3)
    assert completion.logprobs.tolist() == [-0.5] * len(tokens)
