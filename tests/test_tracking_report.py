"""The report shows any run folder, finished or not, says only what the numbers show, and runs nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from whet.errors import RunError
from whet.pipeline.kinds import KINDS
from whet.records import Completion, Ending, Episode, Group, Message, Outcome, Score, Turn
from whet.tracking.charts import IMITATION, PLAIN, TRAINING, board
from whet.tracking.graph import StageNode, graph
from whet.tracking.log import RunLog
from whet.tracking.report import write_report
from whet.tracking.sinks import LiveReport
from whet.tracking.summary import EvalLine, StageView, figures, stage_line, verdict
from whet.tracking.svg import Axis, Series, line_chart, nice_ticks, stacked_chart
from whet.tracking.text import THIN, counted, number, percent, points, seconds, share

LOOKS = {kind.config.kind_name(): kind.look for kind in KINDS}

ATTACK = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>'


def decode(tokens: tuple[int, ...] | list[int]) -> str:
    return "".join(map(chr, tokens))


def episode(sample: int, answer: str, reward: float) -> Episode:
    tokens = tuple(map(ord, answer))
    written = Completion(tokens=tokens, logprobs=(-0.5,) * len(tokens), version=1, ending=Ending.STOP)
    return Episode(
        task="t",
        sample=sample,
        seed=sample,
        messages=(Message(role="user", content="Q"), Message(role="assistant", content=answer)),
        turns=(Turn(prompt=(81,), completion=written),),
        score=Score(value=reward, correct=reward > 0.5, parts={ATTACK: reward}, note=ATTACK),
        outcome=Outcome.FINISHED,
    )


# ------------------------------------------------------------------------------------ numbers and charts


def test_numbers_read_well() -> None:
    assert [percent(v).replace(THIN, " ") for v in (0.364, 0.914, 0.002, 0.996, 1.0, 0.0)] == [
        "36 %", "91 %", "0.2 %", "99.6 %", "100 %", "0 %"]  # fmt: skip
    assert [share(v).replace(THIN, " ") for v in (0.3642, 0.00213, 1.0, 0.025)] == [
        "36.4 %",
        "0.213 %",
        "100 %",
        "2.5 %",
    ]
    assert [points(v) for v in (0.55, -0.021, 0.0, 0.0998)] == ["+55", "\u22122.1", "0", "+10"]
    assert [number(v) for v in (0, 0.0123, 2.5e-5, 999.9, 12_345, 2.5e6, -1.5)] == [
        "0", "0.0123", "2.5e\u22125", "1,000", "12.3k", "2.5M", "\u22121.5"]  # fmt: skip
    assert [seconds(v).replace(THIN, " ") for v in (0.34, 4.21, 200, 7500)] == [
        "340 ms",
        "4.2 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert [counted(1, "step"), counted(1200, "step")] == ["1 step", "1,200 steps"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.013), (-3.2, 7.9), (0, 1e-6), (2990, 3010), (0, 12345), (0.1, 0.11)]
)
def test_ticks_are_few_even_and_enclose_the_data(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 5 and ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    gaps = [b - a for a, b in pairwise(ticks)]
    assert max(gaps) == pytest.approx(min(gaps))


def heights(svg: str, kind: str) -> list[list[float]]:
    shapes = re.findall(rf'class="{kind} [^"]*" points="([^"]+)"', svg)
    return [[float(pair.split(",")[1]) for pair in shape.split()] for shape in shapes]


def test_a_curve_goes_where_its_axis_says() -> None:
    axis = Axis(label="share", show=str, floor=0.0, ceiling=1.0)
    (ys,) = heights(line_chart([Series(name="s", points=((1, 0.0), (2, 0.5), (3, 1.0)), tone="blue")], axis), "curve")
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2]) and ys[0] > ys[2]  # paper counts downwards


def test_stacked_areas_add_up() -> None:
    axis = Axis(label="share", show=str, floor=0.0, ceiling=1.0)
    parts = [Series(name=name, points=((1, 0.25), (2, 0.5)), tone="blue") for name in ("a", "b")]
    alone = Series(name="c", points=((1, 0.5), (2, 1.0)), tone="blue")
    assert (
        heights(stacked_chart(parts, axis), "layer")[1][-2:] == heights(stacked_chart([alone], axis), "layer")[0][-2:]
    )


@pytest.mark.parametrize("count", [1, 2, 5000])
@pytest.mark.parametrize("log", [False, True])
def test_any_number_of_equal_points_can_be_drawn_small(count: int, log: bool) -> None:
    series = Series(name="<b>", points=tuple((float(step), 0.0) for step in range(1, count + 1)), tone="red")
    svg = line_chart([series], Axis(label="x", show=str, log=log))
    assert "nan" not in svg and "<b>" not in svg and len(svg) < 60_000


# -------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """Collects the tags and their attributes, and checks that they nest."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def eval_row(
    label: str, accuracy: float, length: float, gain: tuple[float, float, float] | None = None
) -> dict[str, object]:
    middle, low, high = gain or (None, None, None)
    return {
        "label": label,
        "accuracy": accuracy,
        "low": accuracy - 0.02,
        "high": accuracy + 0.02,
        "of_k": {
            "pass": {"1": accuracy, "2": 0.97, "4": 0.99},
            "maj": {"4": 0.625},
            "best pref": {"2": 0.5, "4": 0.375},
        },
        "mean_length": length,
        "truncated": 0.0,
        "samples": 4,
        "tasks": 500,
        "gain": middle,
        "gain_low": low,
        "gain_high": high,
    }


def fake_run(folder: Path, *, finished: bool = True) -> Path:
    """A small run folder as the pipeline leaves it, with hostile text wherever text can come from outside."""
    stages = {
        "warm": {"kind": "sft", "train": {"steps": 20}},
        "rl": {"kind": "rl", "train": {"steps": 30}},
        "check": {"kind": "eval"},
    }
    recipe = {"name": "demo", "description": ATTACK, "seed": 7, "model": {"path": ATTACK}, "stages": stages}
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "run.json").write_text(json.dumps({"name": "demo", "seed": 7, "versions": {"whet": "0.1.0"}}))
    for index, (name, config) in enumerate(stages.items(), start=1):
        if name == "check" and not finished:
            break
        stage = folder / "stages" / f"{index:02d}-{name}"
        stage.mkdir(parents=True)
        (stage / "stage.json").write_text(json.dumps({"name": name, "kind": config["kind"]}))
        log = RunLog(stage, decode)
        for step in range(1, 21):
            if name == "warm":
                log.write(step, {"loss": 4 / step, "lr": 1e-3, "grad_norm": math.nan if step == 3 else 1 / step})
            elif name == "rl":
                lost = {"outcomes/grader_error": 0.1} if step == 7 else {}
                metrics = {"reward": step / 20, f"rewards/{ATTACK}": 0.1, "solved": step / 25, "loss": 0.0, **lost}
                played = Group(task="t", episodes=(episode(0, ATTACK, step / 20), episode(1, "no", 0.0)))
                log.write(step, {**metrics, "time/rollout": 1.9 + 0.2 * (step % 2), "time/train": 1.0}, [played])
        log.close()
        if name == "check":
            rows = [
                {**eval_row("base", 0.36, 13), "rewards": {"verifier": 0.36}},
                {**eval_row(f"RL{ATTACK}", 0.91, 24, (0.55, 0.51, 0.59)), "rewards": {"verifier": 0.91, ATTACK: 0.25}},
            ]
            (stage / "eval.json").write_text(json.dumps({"rows": rows, "k": 4}))
        if finished or name == "warm":
            (stage / "manifest.json").write_text("{}")
    return folder


def test_the_page_is_whole_self_contained_and_runs_nothing(tmp_path: Path) -> None:
    path = write_report(fake_run(tmp_path / "run"), LOOKS)
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text())
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "form", "base"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src", "xlink:href"):
            assert name not in attributes or str(attributes[name]).startswith(("#", "data:,"))
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert "&lt;script&gt;" in path.read_text()  # shown, as text


def test_the_page_says_what_happened(tmp_path: Path) -> None:
    text = write_report(fake_run(tmp_path / "run"), LOOKS).read_text().replace(THIN, " ")
    assert "Held-out accuracy rose from 36 % (base) to 91 % (RL" in text
    assert "+55 points, 95 % interval +51 to +59, while answers grew from 13 to 24 tokens." in text
    for title in ("Loss", "Reward", "Solved", "Time per step", "Outcomes other than finished", "Gradient norm"):
        assert f"<h4>{title}</h4>" in text
    assert "<h4>Entropy</h4>" not in text  # no such metric in this run
    assert "1 min 00 s" in text  # 20 steps of 3 seconds
    # The gain and what several answers come to stand beside the accuracy, and rewards that are not the accuracy.
    assert "<th>verifier</th>" not in text and "<th>&lt;/pre&gt;&lt;script&gt;" in text
    assert text.index("<th>gain over base</th>") < text.index("<th>pass@4</th><th>maj@4</th><th>best pref@4</th>")
    assert '<td data-name="maj@4">62.5 %</td><td data-name="best pref@4">37.5 %</td>' in text
    assert re.search(r'data-name="truncated">0\.0 %</td>\s*<td data-name="[^"]*">0\.25</td></tr>', text)
    assert "the same task early" in text.lower()


def test_failures_of_one_step_are_not_drawn_as_if_every_step_had_them(tmp_path: Path) -> None:
    """Outcomes are logged where there are any: a step that finished all its episodes has no failures, not the last."""
    lines: list[dict[str, float | None]] = [{"step": float(n), "outcomes/finished": 8.0} for n in range(1, 21)]
    lines[9] |= {"outcomes/finished": 7.0, "outcomes/truncated": 1.0}
    (card,) = [card for card in board(lines, TRAINING).sections[""] if card.title == "Outcomes other than finished"]
    assert (card.before, card.now) == ("0", "0")


def test_early_and_late_answers_are_of_the_held_out_tasks_where_there_are_any(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    log = RunLog(folder / "stages" / "02-rl" / "evaluation", decode)
    for step, answers in ((0, ("unsure", "lost")), (20, ("solved it", "lost"))):
        played = [
            Group(task=f"held-{i}", episodes=(replace(episode(0, said, float(said == "solved it")), task=f"held-{i}"),))
            for i, said in enumerate(answers)
        ]
        log.write(step, {"solved": 0.5}, played)
    log.close()
    text = write_report(folder, LOOKS).read_text()
    early, late = text.partition("The same task early, at step 0")[2].split("and late, at step 20")
    assert "unsure" in early and "solved it" in late and "lost" not in early


def test_what_says_nothing_is_named_and_not_drawn() -> None:
    """One reward is the whole reward, and the share that is solved; the rate never moves."""
    lines = [{"step": n, "reward": n / 9, "rewards/accuracy": n / 9, "solved": n / 9, "lr": 1e-3} for n in range(9)]
    drawn = board(lines, TRAINING)
    assert [card.title for card in drawn.sections[""]] == ["Reward"]
    assert drawn.sections[""][0].legend == ()
    assert drawn.left_out == ["Solved (as in Reward)", "Learning rate (0.001 throughout)"]
    flat = board([{"step": n, "loss": 2.0} for n in range(9)], IMITATION)
    assert [card.title for card in flat.sections[""]] == ["Loss"], "the main chart is drawn whatever it says"


def test_the_numbers_above_a_chart_are_the_ends_of_its_curve() -> None:
    lines = [{"step": n, "reward": n + (-1.0) ** n * 9} for n in range(60)]
    (card,) = board(lines, TRAINING).sections[""]
    (ys,) = heights(card.svg, "curve")
    ticks = re.findall(r'class="tick end" x="[^"]*" y="([^"]+)">([^<]+)<', card.svg)
    (low, at_low), (high, at_high) = (
        (float(y) - 3.5, float(value.replace("\N{MINUS SIGN}", "-"))) for y, value in (ticks[0], ticks[-1])
    )
    shown = [at_low + (low - y) / (low - high) * (at_high - at_low) for y in (ys[0], ys[-1])]
    assert [float(card.before.replace("\N{MINUS SIGN}", "-")), float(card.now)] == pytest.approx(shown, abs=0.3)


def test_the_headline_of_a_failed_run_is_the_failure(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", finished=False)
    text = write_report(folder, LOOKS, failure="<b>no space</b>").read_text()
    assert 'class="verdict failed">Failed in rl, after 20 steps: &lt;b&gt;no space&lt;/b&gt;' in text


def test_a_run_at_work_and_one_without_anything_have_pages(tmp_path: Path) -> None:
    text = write_report(fake_run(tmp_path / "run", finished=False), LOOKS).read_text().replace(THIN, " ")
    assert "step 20 of 30" in text and "waiting" in text and "nothing was evaluated yet" in text
    (tmp_path / "new" / "stages" / "01-rl").mkdir(parents=True)
    assert "no numbers yet" in write_report(tmp_path / "new", LOOKS).read_text()
    with pytest.raises(RunError, match="not a run folder"):
        write_report(tmp_path, LOOKS)


def test_the_graph_has_every_stage_its_state_and_what_it_reads(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", finished=False)
    text = write_report(run, LOOKS, reads={"warm": [], "rl": ["warm"], "check": ["warm", "rl"]}, live=True).read_text()
    Page(text)
    drawing = text[text.index('<svg class="graph"') : text.index("</svg>", text.index('<svg class="graph"'))]
    assert re.findall(r'class="node ([a-z-]+)"><title>([^:]*):', drawing)[1:] == [
        ("done", "warm"),
        ("running", "rl"),
        ("waiting", "check"),
    ]
    assert "step 20 of 30" in drawing and re.findall(r'href="#(\w+)"', drawing) == ["warm", "rl"]
    paths = re.findall(r'class="edge" d="([^"]*)"', drawing)
    # From the base, from warm to the next row and to the one below it, from rl.
    assert [path.count("M") for path in paths] == [1, 2, 1]
    assert ATTACK not in text and '<meta http-equiv="refresh"' in text
    assert '<meta http-equiv="refresh"' not in write_report(run, LOOKS).read_text()


def test_lanes_cross_no_other_parents_lane() -> None:
    nodes = [StageNode(name=str(i), kind="sft", state="done", note="", reads=r) for i, r in enumerate(
        [(), ("0",), ("0", "1"), ("1",), ("0", "2"), ("3", "4")])]  # fmt: skip
    drawing = graph(nodes)
    lanes = [set(re.findall(r"Q([\d.]+) ", path)) for path in re.findall(r'd="([^"]*)"', drawing)]
    assert all(len(lane) <= 1 for lane in lanes) and len(set.union(*lanes)) == 3
    assert graph(nodes[:1]) == ""


def test_every_evaluation_is_in_one_table_from_base_to_final(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    assert "From base to final" not in write_report(run, LOOKS).read_text()
    early = run / "stages" / "00-early"
    early.mkdir()
    (early / "stage.json").write_text(json.dumps({"name": "early", "kind": "eval"}))
    (early / "eval.json").write_text(json.dumps({"rows": [eval_row("start", 0.25, 9)], "k": 4}))
    text = write_report(run, LOOKS).read_text()
    table = text[text.index('id="evaluations"') : text.index("</section>", text.index('id="evaluations"'))]
    models = re.findall(r'data-name="model">([^<]*)<', table)
    assert models[:2] == ["start", "base"] and len(models) == 3 and models[2].startswith("RL")
    assert len(re.findall(r'<svg class="interval', table)) == 3


def test_a_report_is_drawn_now_and_then_and_harms_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn, said = [0.0], list[float](), list[str]()
    monkeypatch.setattr("whet.tracking.sinks.time.monotonic", lambda: now[0])

    def draw() -> None:
        drawn.append(now[0])
        now[0] += 1  # a second of drawing is worth half a minute of running
        if len(drawn) > 1:
            raise OSError("the disk is full")

    live = LiveReport(draw, said.append)
    for _ in range(100):
        now[0] += 1
        live.log("rl", 1, {}, ())
    assert drawn[:2] == [5, 40] and len(drawn) == 3
    assert len(said) == 1 and "the disk is full" in said[0]


@pytest.mark.parametrize("name", ["recipe.json", "run.json", "stages/03-check/eval.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = fake_run(tmp_path / "run")
    (folder / name).write_text("{")
    with pytest.raises(RunError, match=f"{Path(name).name}: not JSON"):
        write_report(folder, LOOKS)


@pytest.mark.parametrize("gain", [(0.02, -0.02, 0.06), (-0.2, -0.25, -0.15)])
def test_the_verdict_never_claims_what_the_interval_does_not_show(gain: tuple[float, float, float]) -> None:
    rows = tuple(EvalLine(**eval_row(*row)) for row in (("a", 0.5, 10.0), ("b", 0.5 + gain[0], 10.2, gain)))
    stage = StageView(name="e", kind="eval", look=PLAIN, state="done", planned=None, lines=(), rows=rows)
    said = verdict((stage,))
    assert said.startswith("Held-out accuracy fell" if gain[2] < 0 else "No measurable change")
    assert said.endswith("answers kept their length of 10.2 tokens.")


@pytest.mark.parametrize("kind", [kind for kind in LOOKS if kind != "eval"])
def test_a_stage_that_makes_rows_is_not_said_to_have_trained(kind: str) -> None:
    lines = tuple({"step": step, "rows": 3.0} for step in (1, 2))
    stage = StageView(name="s", kind=kind, look=LOOKS[kind], state="done", planned=None, lines=lines, rows=())
    trains = kind in ("sft", "reward_model", "preference", "online_preference", "rl", "distill", "merge")
    assert [tile.value for tile in figures((stage,))] == (["2"] if trains else [])
    assert stage_line(stage) == ("" if trains else "6 rows from 2 chunks of tasks.")
