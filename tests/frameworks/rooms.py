"""A server of OpenEnv: a number to be guessed. At 60 the step hangs, at 61 the server stops."""

import os
import signal
import time

from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Guess(Action):
    """Guess the number."""

    number: int


class Hint(Observation):
    hint: str = ""


class Room(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, wanted=3):
        self.wanted = wanted
        return Hint(hint="guess", done=False, reward=None)

    def step(self, action, timeout_s=None):
        if action.number == 60:
            time.sleep(30)
        if action.number == 61:
            os.kill(os.getpid(), signal.SIGSTOP)
        if action.number > 99:
            raise ValueError("too large")
        right = action.number == self.wanted
        return Hint(hint="right" if right else "wrong", done=right, reward=1.0 if right else -0.25)

    @property
    def state(self):
        return State()


app = create_fastapi_app(Room, Guess, Hint, max_concurrent_envs=8)
