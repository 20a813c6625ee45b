"""The search tool: engines over one corpus, hostile queries, and a retriever over HTTP that lives, is late or dies."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import ValidationError

from tests.test_shipped_tools import environment, played
from whet.config.environment import EnvironmentConfig
from whet.envs.tools.play import ToolEnvironments
from whet.envs.tools.retrievers import BM25Retriever, Retriever, TantivyRetriever, passage
from whet.envs.tools.search import Search
from whet.errors import ConfigError, EnvironmentFailure
from whet.target import TargetError

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is in the dev extra")

from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

MODULES = {"bm25": "bm25s", "tantivy": "tantivy"}
ENGINES = {"bm25": BM25Retriever, "tantivy": TantivyRetriever}
WORDS = ["amber", "basalt", "cedar", "dune", "ember", "fjord", "glacier", "harbor", "island", "jungle"]
CORPUS = [" ".join(random.Random(n).choices(WORDS, k=6)) for n in range(200)]


@pytest.fixture(params=MODULES)
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(MODULES[request.param], reason=f"needs whet[{request.param}]")
    name: str = request.param
    return name


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"title": "Rome", "contents": "The capital of Italy."}\n{"text": "Cats <|im_end|> sleep."}\n')
    return path


def searches(*queries: str) -> list[tuple[str, dict[str, Any]]]:
    return [("search", {"query": query}) for query in queries]


# ------------------------------------------------------------------------------------------------ a local corpus


def test_every_play_searches_the_one_index(corpus: Path, engine: str) -> None:
    with environment(kind="search", corpus=str(corpus), engine=engine) as made:
        for _ in range(3):  # each in a fork of its own
            told, _ = played(made, searches("capital Italy", "sleep cats", "zebra"))
            assert told[1:] == ["(1) Rome: The capital of Italy.", "(1) Cats <|im_end|> sleep.", "nothing found"]
    corpus.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ConfigError, match=r"corpus\.jsonl:2: a line is an object with a text"):
        ToolEnvironments(EnvironmentConfig.model_validate({"kind": "search", "corpus": corpus, "engine": engine}))


def test_engines_find_what_counting_words_finds(engine: str) -> None:
    """Passages have equal lengths, so the best for one word has it most often; ties are in the corpus's order."""
    found = ENGINES[engine](CORPUS, 7)
    for word in WORDS:
        most = sorted((text for text in CORPUS if word in text), key=lambda text: -text.split().count(word))
        assert found.find(word) == most[:7]
    assert ENGINES[engine](["same words"] * 50, 3).find("words") == ["same words"] * 3
    stems = ENGINES[engine](["a harbor", "many harbors"], 3).find("harbors")
    assert stems == (["many harbors"] if engine == "bm25" else ["a harbor", "many harbors"])


def test_odd_corpora(tmp_path: Path, engine: str) -> None:
    for texts in (["", "ember"], ["\x00", "ember \ud83d"]):
        assert ENGINES[engine](texts, 3).find("ember") == texts[1:]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(TargetError, match=r"empty\.jsonl: has no passages"):
        Search.load(corpus=str(tmp_path / "empty.jsonl"), engine=engine)
    if engine == "bm25":
        with pytest.raises(TargetError, match="the corpus has no words"):
            BM25Retriever(["", "the"], 3)
    else:
        assert TantivyRetriever(["", "the"], 3).find("the") == ["the"]


def test_an_index_leaves_no_threads(engine: str) -> None:
    """Plays are forks of the process that made it, without its threads."""
    before = len(os.listdir("/proc/self/task"))
    ENGINES[engine](CORPUS, 3)
    assert len(os.listdir("/proc/self/task")) == before


_MADE: dict[str, Retriever] = {}


@settings(max_examples=100, deadline=None, database=None)
@given(
    query=st.text()
    | st.lists(st.sampled_from([*WORDS, *'+-*:"()[]{}~^\\/', "AND", "OR NOT", "text:", "[a TO z]"])).map(" ".join)
)
@example(query="ember " * 2000)
@example(query="a" * 100_000)
@pytest.mark.parametrize("name", MODULES)
def test_a_query_is_words_whatever_they_are(name: str, query: str) -> None:
    """It never raises, and finds only passages that have one of its words."""
    pytest.importorskip(MODULES[name], reason=f"needs whet[{name}]")
    Search._retriever = _MADE.setdefault(name, ENGINES[name](CORPUS, 3) if name not in _MADE else _MADE[name])
    told = Search().search(query)
    words = [word for word in WORDS if word in query.lower()]
    assert told == Search().search(query)
    assert told == "nothing found" or all(any(word in line for word in words) for line in told.splitlines())
    if any(f" {word} " in f" {query} " for word in WORDS):
        assert told != "nothing found"


def test_recall_of_published_questions(shared_data: Path, engine: str) -> None:
    """The figures of docs/agents.md: the share of questions whose gold passage is among the first three."""
    folder = shared_data / "search_qa"
    with (
        gzip.open(folder / "shared" / "corpus.jsonl.gz", "rt") as rows,
        gzip.open(folder / "dev" / "qa.jsonl.gz", "rt") as asked,
    ):
        texts = {row["id"]: passage(row) for row in map(json.loads, rows)}
        questions = [json.loads(line) for line in asked]
    found = ENGINES[engine](list(texts.values()), 3)
    hits = sum(texts[each["gold_doc"]] in found.find(each["question"]) for each in questions)
    assert hits / len(questions) == pytest.approx({"bm25": 0.904, "tantivy": 0.922}[engine], abs=0.002)


# --------------------------------------------------------------------------------------------- a retriever over HTTP


class _Server(BaseHTTPRequestHandler):
    """Answers a request as its server's `answer` says: an object, bytes, a status, or nothing."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        said = self.server.answer(asked)  # type: ignore[attr-defined]
        if said is None:
            self.close_connection = True
            return
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(said if isinstance(said, int) else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def hits(asked: dict[str, Any], *, more: int = 0) -> dict[str, Any]:
    """What Search-R1's server answers."""
    (query,) = asked["queries"]
    documents = [{"id": str(n), "contents": f"{query} {n}"} for n in range(asked["topk"] + more)]
    return {"result": [[{"document": document, "score": 1.5} for document in documents]]}


@contextmanager
def retriever(answer: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[ThreadingHTTPServer, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.asked, server.answer = [], answer  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/retrieve"
    finally:
        server.shutdown()
        server.server_close()


def after_first(answer: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """Well until the retriever was found to be there."""
    return lambda asked: hits(asked) if asked["queries"] == ["whet"] else answer(asked)


def test_a_retriever_is_asked_from_every_play(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets Search-R1's request, past proxies; what it finds looks like what a corpus has, and is cut to `top`."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with retriever(lambda asked: hits(asked, more=1)) as (server, url):
        with environment(kind="search", url=url, top=2) as made:
            for _ in range(2):
                told, _ = played(made, searches("dune", "  ", '"'))
                assert told[1:] == ["(1) dune 0\n(2) dune 1", "nothing found", '(1) " 0\n(2) " 1']
        asked = server.asked  # type: ignore[attr-defined]
    assert asked[1] == {"queries": ["dune"], "topk": 2, "return_scores": True}
    assert [each["queries"][0] for each in asked] == ["whet", *["dune", '"'] * 2], "asked once before the plays"


def test_titles_are_shown_and_nothing_may_be_found() -> None:
    titled = {"result": [[{"document": {"title": "Rome", "text": "A city."}, "score": 1}]]}
    for answer, told in ((titled, "(1) Rome: A city."), ({"result": [[]]}, "nothing found")):
        with retriever(lambda asked, answer=answer: answer) as (_, url), environment(kind="search", url=url) as made:
            assert played(made, searches("dune"))[0][1:] == [told]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"no JSON", "is not of the form .*no JSON"),
        (b"[" * 100_000, "is not of the form"),
        ({"results": []}, 'is not of the form .*"results"'),
        ({"result": []}, "is not of the form"),
        ({"result": [{"document": {"contents": "a"}}]}, "is not of the form"),
        ({"result": [[{"id": "1", "contents": "a"}]]}, "is not of the form"),
        ({"result": [[{"document": {"contents": 7}}]]}, "is not of the form"),
        ([], "is not of the form"),
        (422, "HTTP Error 422"),
        (503, "HTTP Error 503"),
        (None, "RemoteDisconnected"),
    ],
)
def test_a_failing_retriever_is_the_machinerys_failure(answer: Any, why: str) -> None:
    with retriever(after_first(lambda asked: answer)) as (server, url):
        with environment(kind="search", url=url) as made, pytest.raises(EnvironmentFailure) as failed:
            played(made, searches("dune"))
        assert re.search(rf"search: .*retriever {url}: .*{why}", str(failed.value))
        assert len(server.asked) == (3 if answer is None else 2), "a lost connection is tried once more"  # type: ignore[attr-defined]
    with retriever(lambda asked: answer) as (_, url), pytest.raises(ConfigError) as refused:
        ToolEnvironments(EnvironmentConfig.model_validate({"kind": "search", "url": url}))
    assert re.search(rf"retriever {url}: .*{why}.*; start it, or mend url", str(refused.value))


def test_a_connection_that_is_lost_once_is_made_again() -> None:
    lost: list[str] = []

    def answer(asked: dict[str, Any]) -> Any:
        lost.append(asked["queries"][0])
        return None if lost.count("dune") == 1 else hits(asked)

    with retriever(after_first(answer)) as (_, url), environment(kind="search", url=url, top=1) as made:
        assert played(made, searches("dune"))[0][1:] == ["(1) dune 0"]
    assert lost == ["dune", "dune"]


def test_a_late_retriever_is_not_the_policys_fault() -> None:
    """Within `call_s`, and before the play would be killed for it."""
    with retriever(after_first(lambda asked: time.sleep(4) or hits(asked))) as (server, url):
        with environment(kind="search", url=url, call_s=1, limits={"call_s": 60}) as made:
            began = time.monotonic()
            with pytest.raises(EnvironmentFailure, match=f"retriever {url}: "):
                played(made, searches("dune"))
            assert time.monotonic() - began < 4
        assert len(server.asked) == 2, "it is not asked again"  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "give one of the two"),
        ({"corpus": "a.jsonl", "url": "http://h/retrieve"}, "give one of the two"),
        ({"url": "h:8000"}, "must be a whole address, http://HOST:PORT/retrieve"),
        ({"url": "http://h/retrieve", "engine": "tantivy"}, "engine is of a corpus; remove it"),
        ({"corpus": "a.jsonl", "call_s": 2}, "call_s is of a url; remove it"),
        ({"corpus": "a.jsonl", "engine": "lucene"}, "'bm25' or 'tantivy'"),
        ({"url": "http://h/retrieve", "call_s": 10}, "search: call_s 10 must be below limits.call_s 10"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        EnvironmentConfig.model_validate({"kind": "search", **given})


def test_what_is_missing_is_named(corpus: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EnvironmentConfig.model_validate({"kind": "search", "corpus": "a.jsonl", "limits": {"call_s": 3}}).tools
    monkeypatch.setitem(sys.modules, MODULES[engine], None)
    extra = {"bm25": "search", "tantivy": "tantivy"}[engine]
    with pytest.raises(TargetError, match=rf"pip install 'whet\[{extra}\]'"):
        Search.load(corpus=str(corpus), engine=engine)
    with pytest.raises(TargetError, match="a corpus with engine bm25 or tantivy, or a url; give one of the two"):
        Search.load()
    with pytest.raises(TargetError, match="a corpus with engine bm25 or tantivy"):
        Search.load(corpus=str(corpus), engine="lucene")
