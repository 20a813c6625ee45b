"""Stages that make rows: what is judged becomes rows, what is not is counted, and a stage that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_endpoint import says, serving, status
from whet.config import DataConfig, GeneratedConfig
from whet.config.loading import Loaded, load_recipe
from whet.data.formats import load_conversations, load_tasks
from whet.data.preferences import load_comparisons
from whet.envs.base import Attempt, Task
from whet.envs.judges import rules
from whet.envs.judges.ask import read_verdict
from whet.envs.judges.fence import opened
from whet.envs.judges.judge import Wording, verdicts_of
from whet.envs.judges.questions import questions, teach
from whet.envs.rewards.exact import right_verdict
from whet.errors import ConfigError, DataError, RewardError, RunError
from whet.launch.check import check_recipe
from whet.launch.main import run_recipe
from whet.pipeline.lineage import Choices
from whet.pipeline.load_data import comparisons
from whet.pipeline.stages.revise import REWRITE, revise
from whet.records import Message, Reply
from whet.tracking.log import read_metrics, read_rollouts

MODEL = '{path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}'
STAGES = {
    "compare": """
    kind: compare
    tasks: {generate: arithmetic, count: 10, digits: 1}
    samples: 3
    chunk: 4
    model: whet:demo
    judge: {model: {script: "JUDGE"}, visible: everything}
    sampling: {max_tokens: 24}
""",
    "revise": """
    kind: revise
    model: whet:demo
    tasks: {generate: arithmetic, count: 6, digits: 2}
    principles: [Show your work., Be right.]
    writer: {script: "whet.envs.judges.rules:tutor"}
    visible: everything
    chunk: 4
    max_tokens: 40
""",
    "agreement": """
    kind: agreement
    data: {generate: arithmetic, count: 10, digits: 2, answers: 3}
    judge: {model: {script: "JUDGE"}, visible: everything}
    chunk: 4
""",
}


def load(folder: Path, kind: str, *words: str, judge: str = "whet.envs.judges.rules:longer") -> Loaded:
    stages = STAGES[kind].replace("JUDGE", judge)
    (folder / "r.yaml").write_text(f"name: r\nmodel: {MODEL}\nstages:\n  made:{stages}")
    return load_recipe(folder / "r.yaml", [f"out={folder / 'run'}", *words])


def run(
    folder: Path, kind: str, *words: str, judge: str = "whet.envs.judges.rules:longer", accept: tuple[str, ...] = ()
) -> Path:
    run_recipe(load(folder, kind, *words, judge=judge), quiet=True, choices=Choices(accept=accept))
    return folder / "run" / "stages" / "01-made"


def rows_of(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "rows.jsonl").read_text().splitlines()]


def totals(stage: Path) -> dict[str, float]:
    lines = read_metrics(stage)
    return {name: sum(line[name] or 0 for line in lines) for name in lines[0] if not name.startswith("time")}


def said(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


class Says:
    """`Chat` by a function of the whole conversation."""

    def __init__(self, rule: Callable[[Sequence[Message]], str | None]) -> None:
        self.rule = rule

    def chat(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int, **_: Any) -> list[Reply]:
        texts = [self.rule(conversation) for conversation in conversations]
        return [
            Reply(message=None, failure="down") if t is None else Reply(message=Message(role="assistant", content=t))
            for t in texts
        ]

    def probabilities(self, *_: object) -> list[tuple[float, ...] | None]:
        raise NotImplementedError

    def close(self) -> None:
        pass


# --------------------------------------------------------------------------------------------------- compare


def test_a_judge_makes_comparisons_that_the_loaders_read(tmp_path: Path) -> None:
    stage = run(tmp_path, "compare")
    rows, counted = rows_of(stage), totals(stage)
    assert 0 < len(rows) == counted["rows"] <= 10
    assert counted["pairs/judged"] <= 30 and counted["pairs/order_flips"] == 0
    read, lost = load_comparisons(DataConfig(path=str(stage / "rows.jsonl")))
    assert not lost.total and len(read) == len(rows)
    for row, comparison in zip(rows, read, strict=True):
        better, worse = (answer[0].content for answer in comparison.answers)
        assert len(better) > len(worse) and comparison.confidence == 1.0, "the judge likes length"
        assert row["task"].startswith("arithmetic:") and row["reasons"].startswith("Verdict")
    rates = {rollout.reward for rollout in read_rollouts(stage)}
    assert {1.0, -1.0} <= rates <= {1.0, -1.0, 0.0, 0.5, -0.5, None}, "win rates against two others"


def test_an_answer_that_was_cut_off_is_in_no_row(tmp_path: Path) -> None:
    """A row would say that the answer ends there, and whoever imitates or prefers it would learn to stop there."""
    stage = run(tmp_path, "compare", "stages.made.sampling.max_tokens=9")
    cut = {rollout.completion for rollout in read_rollouts(stage) if rollout.ending == "length"}
    assert totals(stage)["answers/cut_off"] == sum(r.ending == "length" for r in read_rollouts(stage)) > 0
    answers = {row[side][0]["content"] for row in rows_of(stage) for side in ("chosen", "rejected")}
    assert answers and answers.isdisjoint(cut)


def test_all_pairs_or_the_furthest(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    few, all_of_them = (run(tmp_path / name, "compare", f"stages.made.pairs={how}") for name, how in
                        (("a", "best_worst"), ("b", "all")))  # fmt: skip
    counted = totals(all_of_them)
    assert len(rows_of(all_of_them)) == counted["pairs/judged"] - counted["pairs/ties"] > len(rows_of(few))


def test_rewards_label_as_well(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(completions, **_): return [float(len(c[0]['content'])) for c in completions]")
    words = ("stages.made.judge=null", f"stages.made.rewards=[{{kind: function, path: '{tmp_path}/f.py:f'}}]")
    (tmp_path / "all").mkdir()
    scores: dict[str, set[float]] = {}
    for row in rows_of(run(tmp_path / "all", "compare", *words, "stages.made.pairs=all")):
        assert row["chosen_score"] > row["rejected_score"] and row["confidence"] == 1.0
        assert row["chosen_score"] == len(row["chosen"][0]["content"])
        scores.setdefault(row["task"], set()).update((row["chosen_score"], row["rejected_score"]))
    furthest = rows_of(run(tmp_path, "compare", *words, "stages.made.pairs=best_worst"))
    assert max(map(len, scores.values())) > 2 and len(furthest) == len(scores)
    for row in furthest:
        assert (row["chosen_score"], row["rejected_score"]) == (max(scores[row["task"]]), min(scores[row["task"]]))


def test_an_unsure_judge_makes_soft_labels(tmp_path: Path) -> None:
    """Sure where the longer answer stands first, undecided where it stands second: 3/4 for it."""
    (tmp_path / "j.py").write_text(
        "from whet.envs.judges.fence import opened\n"
        "def j(messages):\n"
        "    _, first, second = opened(messages[-1]['content'])\n"
        "    return 'Verdict: A' if len(first) > len(second) else 'Verdict: tie'\n"
    )
    stage = run(tmp_path, "compare", judge=f"{tmp_path}/j.py:j")
    assert {row["confidence"] for row in rows_of(stage)} == {0.75}
    for row in rows_of(stage):
        assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])


@pytest.mark.parametrize(("says", "metric"), [("Verdict: A", "pairs/ties"), ("Verdict: tie", "pairs/ties")])
def test_a_judge_without_a_preference_makes_no_rows(says: str, metric: str, tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text(f"def j(messages): return {says!r}\n")
    with pytest.raises(DataError, match="not one row came of 10 tasks"):
        run(tmp_path, "compare", judge=f"{tmp_path}/j.py:j")
    counted = totals(tmp_path / "run" / "stages" / "01-made")
    assert counted[metric] == counted["pairs/judged"] > 0


BROKEN = """
from pathlib import Path
from whet.envs.judges.rules import longer
HERE = Path(__file__).parent
def j(messages):
    with (HERE / "asked").open("a") as file:
        file.write("x")
    if (HERE / "broken").exists() and (HERE / "asked").stat().st_size > 30:
        HOW
    return longer(messages)
"""


@pytest.mark.parametrize("how", ['return "no idea"', 'raise ConnectionError("refused")', "import time; time.sleep(9)"])
def test_a_judge_that_breaks_stops_the_stage_and_nothing_is_lost(how: str, tmp_path: Path) -> None:
    """Nonsense, unreachable, late: no row, one line, and the same command goes on where it was."""
    (tmp_path / "j.py").write_text(BROKEN.replace("HOW", how))
    (tmp_path / "broken").write_text("")
    words = ["stages.made.judge.model.deadline_s=0.2"]
    with pytest.raises(RewardError, match=r"most of chunk [23] of 3 could not be judged") as caught:
        run(tmp_path, "compare", *words, judge=f"{tmp_path}/j.py:j")
    assert "the same command goes on" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "stages" / "01-made" / "rows.jsonl").exists()
    (tmp_path / "broken").unlink()
    (tmp_path / "j.py").write_text(BROKEN.replace("HOW", "pass"))  # a judge that was mended is another judge
    (tmp_path / "asked").write_text("")
    with pytest.raises(RunError, match=r"judge.model \(.*j.py has changed"):
        run(tmp_path, "compare", *words, judge=f"{tmp_path}/j.py:j")
    stage = run(tmp_path, "compare", *words, judge=f"{tmp_path}/j.py:j", accept=("judge",))
    asked_again = (tmp_path / "asked").stat().st_size
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", "compare", *words)
    assert [{**row, "reasons": ""} for row in rows_of(stage)] == [{**row, "reasons": ""} for row in rows_of(whole)]
    assert asked_again < 2 * totals(whole)["pairs/judged"], "what it had answered was not asked again"


def test_an_endpoint_that_dies_and_comes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP: what was answered is not asked again, what was not is, and the rows are those of an unbroken run."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    alive = 10**6

    def answers(handler: Any) -> None:
        down = len(handler.server.bodies) > alive
        (status(503) if down else says(rules.longer(handler.body["messages"])))(handler)

    with serving(answers) as server:

        def label(name: str, *more: str) -> Path:
            by = f"{{base_url: '{server.url}', model: m, attempts: 1, concurrency: 1, cache: {tmp_path}/{name}.jsonl}}"
            (tmp_path / name / "again").mkdir(parents=True, exist_ok=True)
            return run(
                tmp_path / name / "again" if more else tmp_path / name, "compare", f"stages.made.judge.model={by}"
            )

        whole = label("whole")
        asked = len(server.bodies)
        assert rows_of(label("whole", "again")) == rows_of(whole) and len(server.bodies) == asked, "not one request"
        alive = asked + 15
        with pytest.raises(RewardError, match=r"most of chunk 2 of 3 could not be judged.*503 Service Unavailable"):
            label("broken")
        kept = len((tmp_path / "broken.jsonl").read_text().splitlines())
        before, alive = len(server.bodies), 10**6
        assert kept == 15 and rows_of(label("broken")) == rows_of(whole)
        assert len(server.bodies) - before == asked - kept


def test_single_failures_are_counted_and_make_no_label(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text(
        "from whet.envs.judges.rules import longer\nfrom whet.envs.judges.fence import opened\n"
        "def j(messages):\n"
        "    asked = opened(messages[-1]['content'])[0]\n"
        "    return 'hm' if asked.endswith('1') else longer(messages)\n"
    )
    stage = run(tmp_path, "compare", judge=f"{tmp_path}/j.py:j")
    counted = totals(stage)
    assert counted["pairs/unjudged"] == counted["pairs/unparsed"] > 0
    assert rows_of(stage) and not [r for r in rows_of(stage) if r["prompt"][-1]["content"][-1] == "1"]


def test_a_judge_of_nothing_but_nonsense_stops_and_is_asked_again(tmp_path: Path) -> None:
    """One verdict in a chunk is enough to go on; a chunk without any is the judge's failure, and none of it is kept."""
    (tmp_path / "j.py").write_text(
        "from pathlib import Path\nfrom whet.envs.judges.rules import longer\n"
        "def j(messages):\n"
        "    with (Path(__file__).parent / 'asked').open('a') as file: file.write('x')\n"
        "    return longer(messages) if (Path(__file__).parent / 'well').exists() else 'hm'\n"
    )
    asked = []
    for _ in range(2):
        with pytest.raises(RewardError, match=r"most of chunk 1 of 3 could not be judged; no verdict could be read"):
            run(tmp_path, "compare", judge=f"{tmp_path}/j.py:j")
        asked.append((tmp_path / "asked").stat().st_size)
    assert asked[1] == 2 * asked[0], "what could not be read is asked again"
    (tmp_path / "well").write_text("")
    assert rows_of(run(tmp_path, "compare", judge=f"{tmp_path}/j.py:j"))


def test_what_the_loaders_would_refuse_is_left_out_and_counted(tmp_path: Path) -> None:
    """Bytes are tokens to a tiny model, NUL among them; one such answer used to stop the stage that read the rows."""
    (tmp_path / "w.py").write_text(
        "def w(messages):\n    return 'a\\0b' if messages[0]['content'].count('1') % 2 else 'fine'\n"
    )
    stage = run(tmp_path, "revise", f"stages.made.writer.script={tmp_path}/w.py:w")
    counted = totals(stage)
    assert counted["rows/unreadable"] > 0 and counted["rows"] + counted["rows/unreadable"] == 6
    read, dropped = load_conversations(DataConfig(path=str(stage / "rows.jsonl")))
    assert len(read) == counted["rows"] and not dropped.total


# ---------------------------------------------------------------------------------------------------- revise


def test_revisions_are_rows_to_imitate(tmp_path: Path) -> None:
    stage = run(tmp_path, "revise")
    rows = rows_of(stage)
    assert len(rows) == 6
    for row in rows:
        asked = row["prompt"][-1]["content"]
        assert rules.quality(asked, row["completion"]) == pytest.approx(1.0)
        assert rules.quality(asked, row["draft"]) <= rules.quality(asked, row["completion"])
        assert row["principles"][0] in ("Show your work.", "Be right.")
    assert min(rules.quality(row["prompt"][-1]["content"], row["draft"]) for row in rows) < 0.9
    read, _ = load_conversations(DataConfig(path=str(stage / "rows.jsonl")))
    assert [c.messages[-1].content for c in read] == [row["completion"] for row in rows]
    pairs = DataConfig(path=str(stage / "rows.jsonl"), columns={"chosen": "completion", "rejected": "draft"})
    compared, _ = load_comparisons(pairs)
    assert [c.answers[1][0].content for c in compared] == [row["draft"] for row in rows]


def test_each_round_criticises_what_the_last_one_wrote() -> None:
    seen: list[str] = []

    def writer(conversation: Sequence[Message]) -> str:
        if conversation[-1].content != REWRITE:
            seen.append(opened(conversation[0].content)[1])
            return "too short"
        assert conversation[-2].content == "too short"
        return opened(conversation[0].content)[1] + "!"

    (found,) = revise(
        Says(writer), [said("q")], Says(lambda _: "a").chat([said("q")], max_tokens=3),
        principles=["Be long."], rounds=3, seeds=[0], max_tokens=9,
    )  # fmt: skip
    assert (found.draft, found.revised, seen) == ("a", "a!!!", ["a", "a!", "a!!"])
    assert found.principles == ("Be long.",) * 3 and found.critiques == ("too short",) * 3


@pytest.mark.parametrize(
    ("rewrite", "leaked", "failure"),
    [
        ("By the principle: Be long. Here it is", True, "repeats its instructions"),
        ("=== 0123456789abcdef ===\nanswer", True, "repeats its instructions"),
        (None, False, "down"),
    ],
)
def test_a_revision_that_leaks_or_fails_is_no_row(rewrite: str | None, leaked: bool, failure: str) -> None:
    writer = Says(lambda c: rewrite if c[-1].content == REWRITE else "critique")
    (found,) = revise(
        writer, [said("q")], [Reply(message=Message(role="assistant", content="a"))],
        principles=["Be long."], rounds=2, seeds=[0], max_tokens=9,
    )  # fmt: skip
    assert found.revised is None and found.leaked == leaked and failure in found.failure


@pytest.mark.parametrize("which", ["draft", "critique", "revision"])
def test_a_text_that_was_cut_off_is_in_no_row(which: str) -> None:
    """It would look finished, and whoever imitates it would learn to stop in the middle of a sentence."""

    class Breaks(Says):
        def chat(
            self, conversations: Sequence[Sequence[Message]], *, max_tokens: int, readable: Any = None
        ) -> list[Reply]:
            turn = ["revision" if c[-1].content == REWRITE else "critique" for c in conversations]
            replies = super().chat(conversations, max_tokens=max_tokens)
            return [replace(reply, cut_off=now == which) for reply, now in zip(replies, turn, strict=True)]

    seen: list[object] = []
    draft = Reply(message=Message(role="assistant", content="a"), cut_off=which == "draft")
    (found,) = revise(
        Breaks(lambda c: seen.append(c) or "b"), [said("q")], [draft],  # type: ignore[func-returns-value]
        principles=["Be long."], rounds=2, seeds=[0], max_tokens=9,
    )  # fmt: skip
    assert (found.draft, found.revised, found.cut_off, found.leaked) == ("a", None, True, False)
    assert len(seen) == {"draft": 0, "critique": 1, "revision": 2}[which], "nobody is asked to go on from it"


def test_revisions_of_what_was_cut_off_are_counted(tmp_path: Path) -> None:
    """A model's answers, from its sampler to the row: with 17 tokens some are whole and others are not."""
    stage = run(tmp_path, "revise", "stages.made.tasks.count=12", "stages.made.max_tokens=17")
    counted = totals(stage)
    assert counted["rows"] + counted["revisions/cut_off"] == 12 and counted["revisions/failed"] == 0
    assert 0 < counted["rows"] < 12
    answers = (tmp_path / "run" / "answers" / "answers.jsonl").read_text().splitlines()
    cut = {entry["content"] for entry in map(json.loads, answers) if entry["cut_off"]}
    assert cut and cut.isdisjoint(row["draft"] for row in rows_of(stage))


def test_a_draft_that_never_came_is_not_criticised() -> None:
    asked: list[object] = []
    (found,) = revise(
        Says(asked.append), [said("q")], [Reply(message=None, failure="gone")],  # type: ignore[func-returns-value]
        principles=["x"], rounds=1, seeds=[0], max_tokens=9,
    )  # fmt: skip
    assert (found.revised, found.failure, asked) == (None, "gone", [])


# ------------------------------------------------------------------------------------------------- questions

WORDING = Wording(criteria="Which is right?", verdicts=verdicts_of("yes_no"), everything=True)


def test_every_pair_is_asked_in_both_orders() -> None:
    (ranked,), _ = comparisons(GeneratedConfig(generate="arithmetic", count=1, answers=3))
    known = list(questions(ranked, WORDING, form="pairs", reasoning=False))
    assert [each.verdict for each in known] == ["A", "B"] * 3
    for straight, swapped in zip(known[::2], known[1::2], strict=True):
        _, first, second = opened(straight.prompt[0].content)
        assert opened(swapped.prompt[0].content)[1:] == [second, first]
        assert first in [answer[0].content for answer in ranked.answers]
    good, bad = questions(ranked, WORDING, form="points", reasoning=False)
    assert (good.verdict, bad.verdict) == ("Yes", "No")


def test_a_teacher_is_imitated_where_it_is_right() -> None:
    (ranked,), _ = comparisons(GeneratedConfig(generate="arithmetic", count=1))
    known = list(questions(ranked, WORDING, form="pairs", reasoning=True))
    always_a, mute, down = (
        teach(Says(lambda _, says=says: says), known, max_tokens=9)  # type: ignore[misc]
        for says in ("Because.\nVerdict: A", "Because.", None)
    )
    assert [each.completion for each in always_a] == ["Because.\nVerdict: A", None]
    assert [each.wrong for each in always_a] == [False, True]
    assert all(each.completion is None and each.failure and not each.wrong for each in (*mute, *down))


def test_the_reward_of_a_judge_in_training_is_agreement() -> None:
    def grade(text: str) -> float | None:
        task = Task(id="q", messages=said("q"), columns={"verdict": "A"})
        answer = (Message(role="assistant", content=text),)
        return right_verdict(
            Attempt(task=task, messages=answer, completion_tokens=(), truncated=False, max_tokens=9), gold="verdict"
        ).value

    assert [grade(text) for text in ("Verdict: A", "Verdict: B", "A", "<think>Verdict: A</think>")] == [1, 0, 0, 0]
    assert grade("<think>hm</think>So.\nVerdict: A") == 1


def test_questions_serve_sft_and_rl(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"""
name: r
model: {MODEL}
stages:
  ask: {{kind: questions, data: {{generate: arithmetic, count: 3, digits: 1}}, wording: {{visible: everything}}}}
  sft: {{kind: sft, data: {{path: "@ask"}}, train: {{steps: 1, batch_size: 2}}}}
  rl:
    kind: rl
    tasks: {{path: "@ask"}}
    rewards: [{{kind: verdict}}]
    algorithm: grpo
    prompts_per_step: 1
    rollouts_per_prompt: 2
    sampling: {{max_tokens: 4}}
    train: {{steps: 1}}
"""
    )
    loaded = load_recipe(tmp_path / "r.yaml", [f"out={tmp_path / 'run'}"])
    before = check_recipe(loaded)
    assert [check.summary for check in before[1:]] == ["checked once @ask has made its rows"] * 2
    run_recipe(loaded, quiet=True)
    rows = tmp_path / "run" / "stages" / "01-ask" / "rows.jsonl"
    prompts, _ = load_tasks(DataConfig(path=str(rows)))
    assert [p.columns["verdict"] for p in prompts] == ["A", "B"] * 3
    words = [read_verdict(row["completion"], ["A", "B"]) for row in map(json.loads, rows.read_text().splitlines())]
    assert words == ["A", "B"] * 3
    assert check_recipe(loaded)[1].summary.startswith("6 rows")


# -------------------------------------------------------------------------------------------------- agreement


def agreed(stage: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage / "reward.json").read_text())
    return found


def test_a_judge_is_held_against_what_is_known(tmp_path: Path) -> None:
    """The rule that knows sums is never wrong; the rule that likes length is as good as "the longer one is better"."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    knows = agreed(run(tmp_path / "a", "agreement", judge="whet.envs.judges.rules:sums"))
    likes = agreed(run(tmp_path / "b", "agreement"))
    assert (knows["count"], knows["accuracy"]["questions"]) == (30, 10)
    assert knows["accuracy"]["mean"] == pytest.approx(1 - knows["ties"] / 2), "what it does not decide is a tie"
    assert knows["accuracy"]["mean"] > 0.9
    assert likes["accuracy"] == likes["baseline"] == knows["baseline"] and 0 < likes["accuracy"]["mean"] < 1
    page = (tmp_path / "a" / "run" / "report.html").read_text()
    assert "30 pairs of 10 prompts." in page and "whose two orders disagree (0.0" in page
    assert "30 rows from 3 chunks of tasks." in page and "Optimizer steps" not in page


def test_a_judge_of_places_is_a_coin_and_nonsense_is_counted(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text(
        "def first(messages): return 'Verdict: A'\n"
        "def unsure(messages): return 'hm' if messages[0]['content'].count('1') % 2 else 'Verdict: A'\n"
        "def mute(messages): return 'hm'\n"
    )
    for name in ("first", "unsure", "mute"):
        (tmp_path / name).mkdir()
    first = agreed(run(tmp_path / "first", "agreement", judge=f"{tmp_path}/j.py:first"))
    assert (first["accuracy"]["mean"], first["order_flips"], first["ties"], first["failed"]) == (0.5, 1.0, 1.0, 0.0)
    stage = run(tmp_path / "unsure", "agreement", judge=f"{tmp_path}/j.py:unsure")
    unsure, rows = agreed(stage), rows_of(stage)
    unread = [row["verdict"]["unparsed"] for row in rows]
    assert unsure["failed"] == unsure["unparsed"] == sum(unread) / 30 > 0 and unsure["count"] == 30 - sum(unread)
    assert all((row["verdict"]["chance"] is None) == row["verdict"]["unparsed"] for row in rows)
    mute = run(tmp_path / "mute", "agreement", judge=f"{tmp_path}/j.py:mute")
    assert len(rows_of(mute)) == 30 and not (mute / "reward.json").exists()


def test_a_judge_that_is_away_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "j.py").write_text("def j(messages): raise ConnectionError('refused')\n")
    with pytest.raises(RewardError, match="most of chunk 1 of 3 could not be judged"):
        run(tmp_path, "agreement", judge=f"{tmp_path}/j.py:j")
    assert not (tmp_path / "run" / "stages" / "01-made" / "reward.json").exists()


def test_an_answer_of_several_turns_is_judged_as_a_whole(tmp_path: Path) -> None:
    turns = ("assistant", "7+5?"), ("user", "yes"), ("assistant", "12")
    long = [{"role": role, "content": content} for role, content in turns]
    row = {"prompt": "add", "chosen": long, "rejected": [long[-1]]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (made,) = rows_of(run(tmp_path, "agreement", f"stages.made.data={{path: '{tmp_path}/p.jsonl'}}"))
    assert made["better"] == "[assistant]\n7+5?\n\n[user]\nyes\n\n[assistant]\n12" and made["worse"] == "12"
    assert made["verdict"]["chance"] == 1.0


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages.made.judge=null"], "give a judge or rewards, one of the two"),
        (["stages.made.rewards=[{kind: verifier}]"], "give a judge or rewards, one of the two"),
        (["stages.made.sampling.temperature=0"], "greedy answers to one task are all the same"),
        (["stages.made.judge.read=probabilities"], "needs the model's own log-probabilities"),
        (["stages.made.judge.scale=[5, 2]"], "the worst score first"),
        (["stages.made.judge.clamp=[0.6, 0.9]"], "two numbers with 0.5 between them"),
        (["stages.made.judge.model.deadline=1"], "did you mean 'deadline_s'"),
        (["stages.made.judge.principles=none.txt"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_loaded_or_checked(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_recipe(load(tmp_path, "compare", *words))


def test_the_report_says_how_many_rows_were_made(tmp_path: Path) -> None:
    run(tmp_path, "revise")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "6 rows from 2 chunks of tasks." in page and "Training steps" not in page
