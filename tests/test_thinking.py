"""Budget forcing: thinking is cut at a budget or made to go on, and an evaluation draws accuracy over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from whet.config.loading import load_recipe
from whet.errors import ConfigError, TrainingError
from whet.evals.run import SampledAnswer, compare, summarise
from whet.launch.main import run_recipe
from whet.pipeline.stages.eval import _guard
from whet.records import Completion, Ending, token_ids
from whet.sampling.base import Request, SamplingParams, run
from whet.sampling.budget import BudgetSampler

STOP = 0


def spell(tokens: object) -> str:
    return "".join(map(chr, tokens))  # type: ignore[arg-type]


@dataclass
class Writes:
    """Writes what a function makes of the prompt, up to a stop string, its stop token, or the budget."""

    script: Callable[[str], str]
    seen: list[Request] = field(default_factory=list)
    version: int = 3

    async def sample(self, request: Request) -> Completion:
        self.seen.append(request)
        text = self.script(spell(request.prompt))
        ends = [text.index(stop) + len(stop) for stop in request.params.stop if stop in text]
        tokens = [*map(ord, text[: min(ends)] if ends else text), *([] if ends else [STOP])]
        ending = Ending.STOP_STRING if ends else Ending.STOP
        if len(tokens) > request.params.max_tokens:
            tokens, ending = tokens[: request.params.max_tokens], Ending.LENGTH
        return Completion(tokens=token_ids(tokens), logprobs=[-1.0] * len(tokens), version=3, ending=ending)


def answer(script: Callable[[str], str], **changes: object) -> tuple[str, Ending, str, list[Request]]:
    """What is written, how it ends, which of it was forced (by `.`), and what was asked."""
    inner = Writes(script)
    given = {"thinking": 8, "end": "</>", "cut": [*map(ord, "|</>|")], "wait": [*map(ord, "Hm")], "extensions": 0,
             "max_length": 100, **changes}  # fmt: skip
    sampler = BudgetSampler(sampler=inner, decode=spell, **given)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=6, stop_ids=frozenset({STOP}), stop=("!",))
    found = run(sampler.sample(Request(prompt=[*map(ord, "ask:")], seed=7, params=params)))
    forced = "".join("." if logprob == 0 else "x" for logprob in found.logprobs)
    return spell(found.tokens), found.ending, forced, inner.seen


def think(text: str) -> Callable[[str], str]:
    """Thinks this, and answers 42."""
    return lambda prompt: "42" if "</>" in prompt else text


def test_thinking_is_cut_at_its_budget_and_the_answer_comes_behind_it() -> None:
    text, ending, forced, seen = answer(think("a long thought</>"))
    assert text == "a long t|</>|42\0" and ending is Ending.STOP
    assert forced == "x" * 8 + "." * 5 + "xxx"
    assert [request.params.max_tokens for request in seen] == [8, 6]
    assert [request.params.stop for request in seen] == [("</>",), ("!",)]
    assert seen[0].seed == 7 != seen[1].seed, "without a budget the same random numbers"


def test_thinking_that_ends_by_itself_is_left_alone() -> None:
    text, ending, forced, _ = answer(think("ok</>"))
    assert (text, ending, forced) == ("ok</>42\0", Ending.STOP, "x" * 8)
    text, ending, _, seen = answer(think("42"))  # it never thinks
    assert (text, ending, len(seen)) == ("42\0", Ending.STOP, 1)


def test_thinking_is_extended_in_the_place_of_its_end() -> None:
    text, _, forced, seen = answer(think("ok</>"), extensions=2, thinking=13)
    assert text == "okHmokHmok</>42\0" and forced == "xx..xx..xxxxxxxx"
    assert [request.params.max_tokens for request in seen] == [13, 9, 5, 6]
    text, _, _, _ = answer(think("ok</>"), extensions=5, thinking=6)
    assert text == "okHmok|</>|42\0", "what was left of the budget was too little for another end"


def test_the_models_own_length_is_never_exceeded() -> None:
    _, ending, _, seen = answer(think("a long thought</>"), max_length=10)
    assert ending is Ending.LENGTH and seen[0].params.max_tokens == 6 and len(seen) == 1


RECIPE = """
name: think
model: {path: "whet:tiny", create: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
threads: 1
stages:
  sft: {kind: sft, data: {generate: arithmetic, count: 8, digits: 1}, train: {steps: 1, batch_size: 4}}
  eval:
    kind: eval
    models: {base: "@model", sft: "@sft"}
    tasks: {generate: arithmetic, count: 4, digits: 1, split: test}
    rewards: [{kind: verifier}]
    samples: 2
    budgets: {tokens: [8, 4], end: "=", cut: "= "}
    sampling: {max_tokens: 3}
"""


def test_an_evaluation_has_a_row_and_a_point_for_each_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    loaded = load_recipe("r.yaml")
    budget = loaded.recipe.stages["eval"].budget()
    assert (budget.sequences, budget.tokens_each) == (4 * 2 * 2 * 2, 11)
    rows = run_recipe(loaded, quiet=True)["evaluations"]["eval"]["rows"]
    assert [row["label"] for row in rows] == ["base+4", "base+8", "sft+4", "sft+8"]
    assert [row["gain"] is None for row in rows] == [True, True, False, False], "over the base under the same budget"
    assert all(row["mean_length"] <= row["thinking"] + 2 + 3 for row in rows)
    assert rows[1]["mean_length"] > rows[0]["mean_length"]
    page = Path("runs/think/report.html").read_text()
    assert "Accuracy and tokens of thinking" in page and page.count('class="curve tone-') >= 2
    assert "gain over base</th>" in page and "(base+8) to" in page
    assert 'aria-label="base, sft by tokens of thinking"' in page
    alone = load_recipe("r.yaml", ["out=runs/alone", "stages.eval.models={sft: '@sft'}"])
    rows = run_recipe(alone, quiet=True)["evaluations"]["eval"]["rows"]
    assert [row["gain"] is None for row in rows] == [True, False], "of one model over its smallest budget"


def test_a_guard_stops_a_run_that_lost_what_it_could(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = ["stages.eval.budgets=null", "stages.eval.guard=0.1"]
    with pytest.raises(ConfigError, match="guard compares the last of models with the baseline"):
        load_recipe(tmp_path / "r.yaml", [*words, "stages.eval.models={sft: '@sft'}"])
    config = load_recipe(tmp_path / "r.yaml", words).recipe.stages["eval"]
    context: Any = SimpleNamespace(name="eval", config=config, folder=tmp_path)
    for lost, stops in ((0, False), (10, False), (30, True)):
        shares = {"base": 50, "sft": 50 - lost}
        rows = [
            summarise(label, {str(n): [SampledAnswer(correct=n < right, tokens=1, truncated=False, rewards={})]
                              for n in range(100)})
            for label, right in shares.items()
        ]  # fmt: skip
        if stops:
            with pytest.raises(TrainingError, match=r"eval: guard: sft lost 30.0 points .* and 10 are allowed"):
                _guard(context, compare(rows))
        else:
            _guard(context, compare(rows))
