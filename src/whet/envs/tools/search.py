"""Search over a local corpus by BM25: an index that is made once and shared by all plays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from whet.target import TargetError


class Search:
    """An environment with one tool."""

    _passages: ClassVar[list[str]]
    _index: ClassVar[Any]
    _bm25s: ClassVar[Any]
    _top: ClassVar[int]

    @classmethod
    def load(cls, corpus: str, top: int = 3) -> None:
        """Index a file of JSON lines with `text` or `contents`, and maybe a `title`. Raises `TargetError`."""
        try:
            import bm25s
        except ImportError as error:
            raise TargetError("the search tool needs bm25s; pip install 'whet[search]'") from error
        cls._passages, cls._bm25s, cls._index = _read(Path(corpus)), bm25s, bm25s.BM25()
        cls._top = min(top, len(cls._passages))
        cls._index.index(cls._words(cls._passages), show_progress=False)

    def search(self, query: str) -> str:
        """Find passages of the corpus.

        Args:
            query: Words to look for.

        """
        found, scores = self._index.retrieve(self._words([query]), k=self._top, show_progress=False)
        hits = [int(at) for at, score in zip(found[0], scores[0], strict=True) if score > 0]
        return "\n".join(f"({n}) {self._passages[at]}" for n, at in enumerate(hits, start=1)) or "nothing found"

    @classmethod
    def _words(cls, texts: list[str]) -> Any:
        return cls._bm25s.tokenize(texts, stopwords="en", show_progress=False)


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise TargetError(f"{path}: no such corpus")
    passages = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            passages.append(
                ": ".join(filter(None, [row.get("title"), row["contents" if "contents" in row else "text"]]))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"{path}:{number}: a line is an object with a text; mend or remove it") from error
    return passages or [""]
