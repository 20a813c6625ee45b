"""Search over a corpus: an index that is made once and shared by all plays, or a retriever that all plays ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from whet.envs.tools.retrievers import BM25Retriever, HTTPRetriever, Retriever, TantivyRetriever, read_corpus
from whet.target import TargetError

ENGINES: dict[str, Callable[[Sequence[str], int], Retriever]] = {"bm25": BM25Retriever, "tantivy": TantivyRetriever}


class Search:
    """An environment with one tool."""

    _retriever: ClassVar[Retriever]

    @classmethod
    def load(
        cls, corpus: str | None = None, top: int = 3, engine: str = "bm25", url: str = "", call_s: float = 5.0
    ) -> None:
        """Index a file of JSON lines with `text` or `contents`, and maybe a `title`; or ask a retriever whether it is
        there. Raises `TargetError`."""
        if bool(corpus) == bool(url) or engine not in ENGINES:
            raise TargetError(
                f"search needs a corpus with engine {' or '.join(ENGINES)}, or a url; give one of the two"
            )
        retriever = HTTPRetriever(url, top, call_s) if url else ENGINES[engine](read_corpus(Path(str(corpus))), top)
        cls._retriever = retriever

    def search(self, query: str) -> str:
        """Find passages of the corpus.

        Args:
            query: Words to look for.

        """
        found = self._retriever.find(query)
        return "\n".join(f"({n}) {text}" for n, text in enumerate(found, start=1)) or "nothing found"
