"""What the search tool finds passages with: an index of a local corpus, or a retriever over HTTP."""

from __future__ import annotations

import ipaddress
import json
import os
import time
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from whet.errors import EnvironmentFailure, boundary
from whet.target import TargetError

MOST_BYTES = 16 << 20
"""Of a retriever's answer."""
HEAP_BYTES = 4_000_000_000
"""Above what tantivy begins another segment; nothing is reserved."""
THREADS_S = 60.0
"""Longest wait for the end of tantivy's threads, which a fork would not have."""


class Retriever(Protocol):
    """What finds passages. It is made before any play, and must work in forks of its process."""

    def find(self, query: str) -> list[str]:
        """The passages that fit best, best first, ties in the order of the corpus; none where no word is found."""


class BM25Retriever:
    """bm25s: words as they are, without English stop words."""

    def __init__(self, passages: Sequence[str], top: int) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise TargetError("the search tool needs bm25s; pip install 'whet[search]'") from error
        self._passages, self._top, self._bm25s, self._index = passages, top, bm25s, bm25s.BM25()
        words = self._words(passages)
        if not any(words):
            raise TargetError("the corpus has no words to look for; check its text")
        self._index.index(words, show_progress=False)

    def find(self, query: str) -> list[str]:
        """By BM25 as Lucene computes it."""
        (words,) = self._words([query])
        if not words:
            return []
        scores = self._index.get_scores(words)
        hits = (scores > 0).nonzero()[0]
        return [self._passages[at] for at in hits[(-scores[hits]).argsort(kind="stable")[: self._top]]]

    def _words(self, texts: Sequence[str]) -> Any:
        return self._bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)


class TantivyRetriever:
    """tantivy: BM25 of English stems. Made by one thread, so that a document's number is its place in the corpus."""

    def __init__(self, passages: Sequence[str], top: int) -> None:
        try:
            import tantivy as made
        except ImportError as error:
            raise TargetError("engine: tantivy needs tantivy; pip install 'whet[tantivy]'") from error
        self._passages, self._top, self._tantivy = passages, top, made
        words = made.TextAnalyzerBuilder(made.Tokenizer.simple())
        for each in (made.Filter.remove_long(40), made.Filter.lowercase(), made.Filter.stemmer("english")):
            words = words.filter(each)
        self._words = words.build()
        self._schema = made.SchemaBuilder().add_text_field("text", tokenizer_name="stems", index_option="freq").build()
        index = made.Index(self._schema)
        index.register_tokenizer("stems", self._words)
        index.config_reader("manual")
        before, writer = _threads(), index.writer(HEAP_BYTES, 1)
        for passage in passages:
            writer.add_document(made.Document(text=passage.encode(errors="replace").decode()))  # no halves
        writer.commit()
        writer.wait_merging_threads()  # returns before they have ended
        index.reload()
        self._searcher = index.searcher()
        if self._searcher.num_segments > 1:
            raise TargetError("the corpus is too large for engine: tantivy; serve it by a retriever, and give its url")
        deadline = time.monotonic() + THREADS_S
        while _threads() > before:
            if time.monotonic() > deadline:
                raise TargetError("threads of tantivy do not end, and plays are forked; use engine: bm25")
            time.sleep(0.01)

    def find(self, query: str) -> list[str]:
        """By BM25. The query is words, never tantivy's query language."""
        made = self._tantivy
        terms = (made.Query.term_query(self._schema, "text", word, "freq") for word in self._words.analyze(query))
        asked = made.Query.boolean_query([(made.Occur.Should, term) for term in terms])
        return [self._passages[at.doc] for _, at in self._searcher.search(asked, self._top, False).hits]


class HTTPRetriever:
    """A server of Search-R1's form (`search_r1/search/retrieval_server.py`), asked once when it is made.

    `call_s`: seconds until its answer is there, another attempt after a lost connection included.
    """

    def __init__(self, url: str, top: int, call_s: float) -> None:
        self._url, self._top, self._call_s, self._who = url, top, call_s, f"retriever {url}"
        self._opener = build_opener(ProxyHandler({} if _is_loopback(url) else None))
        try:
            self.find("whet")
        except EnvironmentFailure as error:
            raise TargetError(f"{error}; start it, or mend url") from error

    def find(self, query: str) -> list[str]:
        """In the server's order. Raises `EnvironmentFailure`: whatever is wrong is not the query's fault."""
        if not query.strip():
            return []
        outcome: list[list[str] | EnvironmentFailure] = []
        asking = Thread(target=lambda: outcome.append(self._outcome(query)), daemon=True)  # a name's look-up has no end
        asking.start()
        asking.join(self._call_s)
        found = outcome[0] if outcome else EnvironmentFailure(f"{self._who}: no answer within {self._call_s:g} s")
        if isinstance(found, EnvironmentFailure):
            raise found
        return found

    def _outcome(self, query: str) -> list[str] | EnvironmentFailure:
        try:
            with boundary(EnvironmentFailure, self._who):
                said = self._said(query)
            (hits,) = json.loads(said)["result"]
            return [passage(hit["document"]) for hit in hits][: self._top]
        except EnvironmentFailure as error:
            return error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            form = '{"result": [[{"document": {"contents": TEXT}, "score": NUMBER}]]}'
            excerpt = " ".join(said[:200].decode(errors="replace").split())
            return EnvironmentFailure(f"{self._who}: the answer is not of the form {form} ({excerpt})")

    def _said(self, query: str) -> bytes:
        """The bytes of its answer; a lost connection is tried again."""
        try:
            return self._answer(query)
        except (HTTPError, TimeoutError):
            raise
        except (OSError, HTTPException):
            return self._answer(query)

    def _answer(self, query: str) -> bytes:
        body = json.dumps({"queries": [query], "topk": self._top, "return_scores": True}).encode()
        request = Request(self._url, body, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=self._call_s) as response:
            said: bytes = response.read(MOST_BYTES)
            return said


def read_corpus(path: Path) -> list[str]:
    """The passages of a file of JSON lines. Raises `TargetError`."""
    if not path.is_file():
        raise TargetError(f"{path}: no such corpus")
    passages = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            passages.append(passage(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"{path}:{number}: a line is an object with a text; mend or remove it") from error
    if not passages:
        raise TargetError(f"{path}: has no passages; name a file of JSON lines")
    return passages


def passage(row: Any) -> str:
    """A row as it is shown: its `contents` or `text`, after its `title` if it has one."""
    return ": ".join(filter(None, [row.get("title"), row["contents" if "contents" in row else "text"]]))


def _threads() -> int:
    """How many threads the kernel has of this process; 0 where it does not tell."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
