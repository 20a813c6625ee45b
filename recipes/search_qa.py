"""Questions over a corpus that only a search tool reads, for `search_qa.yaml`: the environment and its rows.

    python recipes/search_qa.py DATA rows/search

DATA holds `corpus.jsonl` (`id`, `title`, `contents`) and `qa.jsonl` (`question`, `answers`, `gold_doc`), each maybe
gzipped and in a folder of its own. Written are `corpus`, `demonstrations`, `tasks` and `held_out`. A demonstration is
made by rule: it searches for the question's words, and answers with what the first passage has of the known answers;
a question whose first passage is not the one that holds the answer, or is long, has none. Tasks are all questions but
those held out.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from whet.envs.tools.schema import as_tool
from whet.envs.tools.search import Search

HELD_OUT = 200
SHOWN_WORDS = 80
"""Most words of a passage in a demonstration: a step of training takes as long as its rows."""
LEFT_OUT = re.compile(
    r"\b(a|an|and|are|as|at|by|did|do|does|for|from|had|has|have|how|in|is|it|its|many|much|of|on|or|the|there|to|was|"
    r"were|what|when|where|which|who|whom|whose|why|with)\b",
    re.IGNORECASE,
)
"""Words of a question that are not looked for."""
PUNCTUATION = re.compile(r"[^\w\s]")
ARTICLES = re.compile(r"\b(a|an|the)\b")


class Library(Search):
    """A search over the corpus, and what the play was worth."""

    def reset(self, gold: str, answers: list[str]) -> None:
        """A question: the passage that holds its answer, and the answers that are right."""
        self.gold, self.answers, self.called, self.found, self.said = gold, answers, False, False, ""

    def search(self, query: str) -> str:
        """Find passages.

        Args:
            query: Words to look for.
        """
        results = super().search(query)
        self.called, self.found = True, self.found or self.gold in results
        return results

    def user(self, message: str) -> None:
        """Take the answer: the play is over."""
        self.said = message

    def reward(self) -> dict[str, float]:
        """A quarter for a call, a quarter for the gold passage, a half for the words of an answer (F1)."""
        f1 = max(overlap(self.said, answer) for answer in self.answers)
        return {"called": self.called / 4, "found": self.found / 4, "f1": f1 / 2}


def plain(text: str) -> list[str]:
    """Words as SQuAD's measure compares them."""
    return ARTICLES.sub(" ", PUNCTUATION.sub(" ", text.lower())).split()


def overlap(said: str, answer: str) -> float:
    """F1 of the words."""
    one, other = plain(said), plain(answer)
    shared = (Counter(one) & Counter(other)).total()
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    """A file of JSON lines anywhere below a folder."""
    path = min(data.rglob(f"{name}.jsonl*"))
    read = path.read_bytes()
    text = (gzip.decompress(read) if path.suffix == ".gz" else read).decode()
    return [json.loads(line) for line in text.split("\n") if line]


def tasks(data: Path) -> list[dict[str, Any]]:
    """The questions in a seeded order; each passage is written once."""
    passages = {row["id"]: " ".join(row["contents"].split()) for row in rows(data, "corpus")}
    listed = [
        {"prompt": row["question"], "gold": passages[row["gold_doc"]], "answers": row["answers"]}
        for row in rows(data, "qa")
    ]
    Random("search_qa").shuffle(listed)
    return listed


def demonstrations(asked: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A search and an answer, where that is what they give."""
    library = Library()
    tools = [as_tool("search", library.search).schema]
    for number, task in enumerate(asked):
        library.reset(task["gold"], task["answers"])
        query = " ".join(LEFT_OUT.sub(" ", PUNCTUATION.sub(" ", task["prompt"])).split())
        results = library.search(query)
        answer = next((each for each in task["answers"] if each in task["gold"] and len(each.split()) <= 5), None)
        if not library.found or answer is None or len(results.split()) > SHOWN_WORDS:
            continue
        call = {"id": f"call{number:05}", "function": {"name": "search", "arguments": {"query": query}}}
        said = [
            {"role": "user", "content": task["prompt"]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": results, "tool_call_id": call["id"], "name": "search"},
            {"role": "assistant", "content": answer},
        ]
        yield {"messages": said, "tools": tools}


def write(data: Path, folder: Path, top: int = 1) -> None:
    """The files that the recipe reads."""
    folder.mkdir(parents=True, exist_ok=True)

    def put(name: str, found: Any) -> Path:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return path

    corpus = [{"contents": " ".join(row["contents"].split())} for row in rows(data, "corpus")]
    Library.load(str(put("corpus", corpus)), top)
    listed = tasks(data)
    put("held_out", listed[:HELD_OUT])
    put("tasks", listed[HELD_OUT:])
    put("demonstrations", demonstrations(listed[HELD_OUT:]))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
