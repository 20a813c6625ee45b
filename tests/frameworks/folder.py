"""Harbor without a container: an environment that is a folder, and an agent that runs what the policy says."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import openai
from harbor.agents.base import BaseAgent
from harbor.environments.base import BaseEnvironment, ExecResult
from harbor.environments.capabilities import EnvironmentCapabilities

PARTS = ("app", "logs/verifier", "logs/agent", "logs/artifacts", "tests")


class Folder(BaseEnvironment):
    capabilities = EnvironmentCapabilities()

    @staticmethod
    def type():
        return "folder"

    def _validate_definition(self):
        pass

    async def start(self, force_build):
        self.root = Path(tempfile.mkdtemp())
        for name in PARTS:
            (self.root / name).mkdir(parents=True, exist_ok=True)

    async def stop(self, delete):
        shutil.rmtree(self.root, ignore_errors=True)

    def _at(self, path):
        return self.root / str(path).lstrip("/")

    async def upload_file(self, source_path, target_path):
        shutil.copy(source_path, self._at(target_path))

    async def upload_dir(self, source_dir, target_dir):
        shutil.copytree(source_dir, self._at(target_dir), dirs_exist_ok=True)

    async def download_file(self, source_path, target_path):
        shutil.copy(self._at(source_path), target_path)

    async def download_dir(self, source_dir, target_dir):
        shutil.copytree(self._at(source_dir), target_dir, dirs_exist_ok=True)

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        for name in ("logs", "tests"):
            command = command.replace(f"/{name}", f"{self.root}/{name}")
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.root / "app",
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {}), "LOGS": f"{self.root}/logs"},
        )
        return ExecResult(stdout=done.stdout, stderr=done.stderr, return_code=done.returncode)


class Asks(BaseAgent):
    @staticmethod
    def name():
        return "asks"

    def version(self):
        return "1"

    async def setup(self, environment):
        pass

    async def run(self, instruction, environment, context):
        asked = [{"role": "user", "content": instruction}]
        said = openai.OpenAI().chat.completions.create(model=self.model_name.removeprefix("openai/"), messages=asked)
        await environment.exec(said.choices[0].message.content)
