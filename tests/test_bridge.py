"""An exported model in lm-evaluation-harness (`pip install lm_eval`); skipped where that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.config import ModelConfig, TrainConfig
from whet.models.load import load_model
from whet.records import TokenRow
from whet.training.engine import LocalTrainer

PAIRS = [("12+30=", "42"), ("A sum. ", "7+8=15")]


def test_the_harness_gives_an_export_the_log_probabilities_that_the_trainer_gives(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = load_model(ModelConfig(path="whet:demo"))
    model.export(tmp_path)
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    found = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=2).loglikelihood(asked)
    rows = []
    for prompt, answer in PAIRS:
        shown, whole = (
            model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer)
        )
        rows.append(TokenRow(tokens=whole, trained=[place >= len(shown) for place in range(len(whole))]))
    own = [float(logp_T.sum()) for logp_T in LocalTrainer(model, TrainConfig()).forward(rows, "logp")["logp"]]
    assert [total for total, _ in found] == pytest.approx(own, abs=1e-3)
