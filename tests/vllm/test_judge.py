"""A judge that is a language model behind a real endpoint: vLLM's own server, asked over HTTP, and in this process."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.vllm.conftest import serving
from whet.config import GeneratedConfig
from whet.config.judge import ChatConfig, EndpointChat, JudgeConfig, JudgeWording, LocalChat
from whet.config.loading import load_recipe
from whet.envs.families import family
from whet.envs.judges import rules
from whet.envs.judges.ask import conversation
from whet.envs.judges.judge import Exchange, build_judge, build_wording
from whet.launch.main import run_recipe
from whet.launch.world import LocalWorld

pytestmark = pytest.mark.usefixtures("vllm")

SUMS = family(GeneratedConfig(generate="arithmetic", digits=1, answers=4))
TRAIN = """
name: judge
model: whet:demo
stages:
  judge:
    kind: sft
    data: {path: ROWS}
    train: {optimizer: muon, lr: 2.0e-3, muon_lr: 0.02, batch_size: 8, steps: 80, schedule: linear}
"""
LABEL = """
name: label
model: whet:demo
stages:
  label:
    kind: compare
    tasks: {generate: arithmetic, count: 24, digits: 1}
    samples: 3
    pairs: all
    chunk: 12
    judge: {model: BY, visible: everything, max_tokens: 16}
    sampling: {max_tokens: 24}
"""


@pytest.fixture(scope="module")
def folder(vllm: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to write verdicts, on one answer and on two; how good they are is another question."""
    home, random = tmp_path_factory.mktemp("judge"), Random(0)
    wording = build_wording(JudgeWording(visible="everything"))
    with (home / "rows.jsonl").open("w") as out:
        for index in range(240):
            asked, answers = SUMS.task(index).messages, list(SUMS.ranking(index))
            first, second = random.sample(answers, 2)
            for question in (wording.pair(asked, (first, second)), wording.single(Exchange(asked=asked, answer=first))):
                (message,) = conversation(question, reasoning=False)
                verdict = rules.sums([{"role": "user", "content": message.content}]).splitlines()[-1]
                out.write(json.dumps({"prompt": message.content, "completion": verdict}) + "\n")
    (home / "judge.yaml").write_text(TRAIN.replace("ROWS", str(home / "rows.jsonl")))
    run_recipe(load_recipe(home / "judge.yaml", [f"out={home / 'run'}"]), quiet=True)
    return home / "run" / "stages" / "01-judge" / "model"


def test_a_judge_says_over_http_what_it_says_in_this_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedily, word for word: verdicts, and the rows that follow from them; asked again, nobody need be there."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    kept = tmp_path / "answers.jsonl"
    with serving(folder, "--served-model-name judge --max-num-seqs 32") as url:
        there = EndpointChat(base_url=f"{url}/v1", model="judge", cache=kept)
        assert verdicts(there) == verdicts(LocalChat(path=str(folder)))
        rows = label(tmp_path / "there", there)
        assert rows and rows == label(tmp_path / "here", LocalChat(path=str(folder)))
    assert rows == label(tmp_path / "gone", there), "the server has ended, and was not asked"


def verdicts(by: ChatConfig) -> list[float | None]:
    judge = build_judge(JudgeConfig(model=by, visible="everything", max_tokens=16), LocalWorld().chat(by))
    asked = [(SUMS.task(index).messages, answer) for index in range(300, 306) for answer in SUMS.ranking(index)]
    points = [opinion.value for opinion in judge.points([Exchange(asked=a, answer=answer) for a, answer in asked])]
    assert sum(value is not None for value in points) > len(points) // 2, "it has learnt to write verdicts"
    pairs = [(asked[i][1], asked[i + 1][1]) for i in range(0, len(asked), 2)]
    found = judge.prefer([messages for messages, _ in asked[::2]], pairs)
    judge.close()
    return [*points, *(preference.chance for preference in found)]


def label(folder: Path, by: ChatConfig) -> list[str]:
    folder.mkdir()
    (folder / "label.yaml").write_text(LABEL.replace("BY", by.model_dump_json(exclude_unset=True)))
    run_recipe(load_recipe(folder / "label.yaml", [f"out={folder / 'run'}"]), quiet=True)
    return (folder / "run" / "stages" / "01-label" / "rows.jsonl").read_text().splitlines()
