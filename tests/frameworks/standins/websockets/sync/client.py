"""A WebSocket whose other end is the server of rooms.py, in this process."""

import json
import threading
import time

HANGS, STOPS = 60, 61


class Socket:
    def send(self, text):
        asked = json.loads(text)
        self.answer = {"type": "observation", "data": getattr(self, f"_{asked['type']}")(asked.get("data"))}
        if isinstance(self.answer["data"], dict) and "code" in self.answer["data"]:
            self.answer["type"] = "error"

    def recv(self, timeout):
        if self.answer["data"] in (HANGS, STOPS):
            time.sleep(0.1)
            raise TimeoutError
        return json.dumps(self.answer)

    def ping(self):
        """The server answers unless it was stopped."""
        answered = threading.Event()
        if self.answer["data"] == HANGS:
            answered.set()
        return answered

    def close(self):
        pass

    def _mcp(self, data):
        return {"jsonrpc": "2.0", "id": data["id"], "error": {"code": -32603, "message": "no tools"}}

    def _reset(self, data):
        self.wanted = data.get("wanted", 3)
        return {"observation": {"hint": "guess", "metadata": {}}, "reward": None, "done": False}

    def _step(self, data):
        number = int(data["number"])
        if number in (HANGS, STOPS):
            return number
        if number > 99:
            return {"message": "too large", "code": "EXECUTION_ERROR"}
        right = number == self.wanted
        observation = {"hint": "right" if right else "wrong", "metadata": {}}
        return {"observation": observation, "reward": 1.0 if right else -0.25, "done": right}

    def _close(self, data):
        return {}


def connect(url, ping_interval, max_size):
    assert url.startswith("ws://") and url.endswith("/ws") and ping_interval is None
    return Socket()
