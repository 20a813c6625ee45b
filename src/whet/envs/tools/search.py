"""Search over a local corpus by BM25: an index that is made once and shared by all plays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from whet.sandbox.worker_main import TargetError


def make_search(corpus: str, top: int) -> Callable[[str], str]:
    """A search over the JSON lines of a file, each with `text` or `contents`, and maybe a `title`.

    Raises `TargetError`, with its line where one cannot be read.
    """
    try:
        import bm25s
    except ImportError as error:
        raise TargetError("the search tool needs bm25s; pip install 'whet[search]'") from error
    passages = _read(Path(corpus))
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)

    def search(query: str) -> str:
        """Find passages of the corpus.

        Args:
            query: Words to look for.

        """
        words = bm25s.tokenize([query], stopwords="en", show_progress=False)
        found, scores = index.retrieve(words, k=min(top, len(passages)), show_progress=False)
        hits = [int(at) for at, score in zip(found[0], scores[0], strict=True) if score > 0]
        return "\n".join(f"({n}) {passages[at]}" for n, at in enumerate(hits, start=1)) or "nothing found"

    return search


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
    if not passages:
        raise TargetError(f"{path}: the corpus is empty")
    return passages
