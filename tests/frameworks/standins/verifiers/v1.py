"""As much of verifiers as the adapter and capitals.py use: a rollout is one question."""

import contextlib
import importlib
import os
from types import SimpleNamespace

import openai

TasksetConfig = EvalClientConfig = ModelContext = SimpleNamespace
SamplingConfig = dict
REWARDS = ("right", "short")


class TaskData(SimpleNamespace):
    @property
    def prompt_text(self):
        return self.prompt


class _Of:
    def __class_getitem__(cls, item):
        return cls


class Task(_Of):
    def __init__(self, data, config):
        self.data = data


class Taskset(_Of):
    def __init__(self, config):
        self.config = config

    def __iter__(self):
        return iter(self.load())


class Trace:
    def __init__(self):
        self.errors, self.rewards, self.last_reply = [], {}, ""


def reward(weight):
    def put(function):
        function.weight = weight
        return function

    return put


def resolve_env_config(data):
    assert data["agent"]["harness"]["id"] == "null"
    return data


class _Env:
    def __init__(self, taskset):
        self.taskset = taskset

    @contextlib.asynccontextmanager
    async def serving(self):
        yield

    async def run_episode(self, task, ctx):
        client, trace = openai.OpenAI(base_url=ctx.client.base_url, api_key=os.environ[ctx.client.api_key_var]), Trace()
        asked = [{"role": "user", "content": task.data.prompt}]
        try:
            said = client.chat.completions.create(model=ctx.model, messages=asked)
        except openai.APIStatusError as error:
            trace.errors.append(SimpleNamespace(type="ProviderError", message=str(error)))
            return SimpleNamespace(errors=[], traces=[trace])
        trace.last_reply = said.choices[0].message.content
        try:
            for name in REWARDS:
                hook = getattr(task, name)
                trace.rewards[name] = SimpleNamespace(value=hook.weight * await hook(trace))
        except OSError as error:
            trace.errors.append(SimpleNamespace(type="TaskError", message=str(error)))
        return SimpleNamespace(errors=[], traces=[trace])


def load_environment(config):
    module = importlib.import_module(config["taskset"]["id"])
    made = getattr(module, module.__all__[0])
    return _Env(made(SimpleNamespace(task=None)))
