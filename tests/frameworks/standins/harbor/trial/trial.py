"""A trial in a folder, without an agent's and an environment's classes."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import openai


class Trial:
    def __init__(self, config):
        self.config = config

    @classmethod
    async def create(cls, config):
        return cls(config)

    async def run(self):
        task, root = self.config["task"]["path"], Path(self.config["trials_dir"])
        (root / "verifier").mkdir()
        asked = [{"role": "user", "content": (task / "instruction.md").read_text()}]
        model = self.config["agent"]["model_name"].removeprefix("openai/")
        try:
            said = openai.OpenAI().chat.completions.create(model=model, messages=asked)
        except openai.APIStatusError as error:
            why = SimpleNamespace(exception_type="BadRequestError", exception_message=str(error))
            return SimpleNamespace(reward_valid=False, exception_info=why, failure_cause="agent_exhausted_budget")
        subprocess.run(["bash", "-c", said.choices[0].message.content], cwd=root)
        subprocess.run(["bash", task / "tests" / "test.sh"], cwd=root, env={**os.environ, "LOGS": str(root)})
        value = float((root / "verifier" / "reward.txt").read_text())
        return SimpleNamespace(reward_valid=True, verifier_result=SimpleNamespace(rewards={"reward": value}))
