"""What holds without vLLM: its absence is one line that says what to install."""

from __future__ import annotations

import sys

import pytest

from tests.laws.support import tiny_model
from whet.errors import MissingExtra
from whet.sampling.vllm import VllmSampler


def test_without_vllm_the_message_is_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'whet\[vllm\]'"):
        VllmSampler(tiny_model())
