"""Reward models: formulas by hand and by finite differences, and the engine's laws for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch
from torch import Tensor

from tests.laws.support import SHAPE, _widen_norms, gradients, largest_difference, random_atoms
from whet.algorithms.answers import pairs_of
from whet.algorithms.reward_model import comparison, objective_of, weighed
from whet.config import ModelConfig, RewardModelStage, TrainConfig
from whet.data.base import Origin
from whet.formulas import reward
from whet.formulas.aggregate import STEPS, pessimistic
from whet.models.load import load_scalar_model
from whet.records import Atom, TokenRow
from whet.training.compare import Compared
from whet.training.engine import LocalTrainer


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_bradley_terry_by_hand() -> None:
    # d = (1, 0.5 - 2, -800): log(1 + e^-1), and no overflow where the order is badly wrong
    found = reward.bradley_terry(vector(1, 0.5, -400), vector(0, 0, 400), margin_P=vector(0, 2, 0), confidence_P=1.0)
    torch.testing.assert_close(found, vector(0.3132616875182228, 1.7014132779827524, 800))


def test_a_label_of_one_half_teaches_that_both_are_equal() -> None:
    at_zero = reward.bradley_terry(vector(0.3), vector(0.3), margin_P=0.0, confidence_P=0.5)
    torch.testing.assert_close(at_zero, vector(math.log(2)))
    d = 0.7  # soft label 0.8: -0.8 log sigmoid(d) - 0.2 log sigmoid(-d)
    soft = reward.bradley_terry(vector(d), vector(0), margin_P=0.0, confidence_P=0.8)
    torch.testing.assert_close(soft, vector(-0.8 * log_sigmoid(d) - 0.2 * log_sigmoid(-d)))


def test_centring_by_hand() -> None:
    torch.testing.assert_close(reward.centring(vector(1, 2), vector(-1, 3)), vector(0, 25))


def test_plackett_luce_by_hand() -> None:
    # Scores log 3, log 2, log 1: p(ranking) = 3/6 * 2/3 * 1/1
    places = reward.plackett_luce(vector(math.log(3), math.log(2), 0))
    torch.testing.assert_close(places, vector(math.log(2), math.log(1.5), 0))


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    better, worse = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    pairs = [reward.plackett_luce(torch.stack(pair)).sum() for pair in zip(better, worse, strict=True)]
    torch.testing.assert_close(torch.stack(pairs), reward.bradley_terry(better, worse, margin_P=0.0, confidence_P=1.0))


def test_probabilities_of_all_rankings_sum_to_one() -> None:
    scores = vector(0.3, -1.2, 2.0)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    total = sum(math.exp(-float(reward.plackett_luce(scores[list(order)]).sum())) for order in orders)
    assert total == pytest.approx(1)


def test_label_loss_by_hand() -> None:
    # log(1 + e^-2), log(1 + e^2), and the soft label's mixture of both
    found = reward.label_loss(vector(2, 2, 2), vector(1, 0, 0.25))
    right, wrong = -log_sigmoid(2), -log_sigmoid(-2)
    torch.testing.assert_close(found, vector(right, wrong, 0.25 * right + 0.75 * wrong))
    assert float(reward.label_loss(vector(-700.0), vector(1.0))) == pytest.approx(700)


def test_pairs_are_of_one_prompt_and_the_better_one_stands_first() -> None:
    better, worse = pairs_of(torch.tensor([0, 0, 0, 1, 2, 2]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (4, 5)]


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs": lambda x: reward.bradley_terry(x[:3], x[3:], margin_P=vector(0, 0.5, 1), confidence_P=vector(1, 0.9, 0.4)),
    "centring": lambda x: reward.centring(x[:3], x[3:]),
    "ranking": reward.plackett_luce,
    "labels": lambda x: reward.label_loss(x, vector(0, 1, 0.3, 1, 0, 0.5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (scores,))


@pytest.mark.parametrize(("how", "one"), [("min", 0.5), ("product", 0.36), ("last", 0.8), ("mean", 2.2 / 3)])
def test_steps_become_one_number(how: str, one: float) -> None:
    assert STEPS[how]([0.9, 0.5, 0.8]) == pytest.approx(one)


def test_models_that_disagree_are_trusted_less() -> None:
    assert pessimistic([1.0, 1.0], spread=2.0) == 1.0
    assert pessimistic([0.0, 2.0], spread=0.5) == pytest.approx(0.5)  # mean 1, std 1
    assert pessimistic([0.0, 2.0], spread=0.0) == 1.0


# ------------------------------------------------------------------------------------------------ the engine


def scalar_trainer(**train: object) -> LocalTrainer:
    """A reward model in float64, with a head that is not zero."""
    model = load_scalar_model(ModelConfig(path="whet:tiny", create=SHAPE))
    _widen_norms(model.module)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.module.score.weight, std=0.1)
    config = TrainConfig.model_validate({"clip_norm": None, **train})
    return LocalTrainer(replace(model, module=model.module.double()), config)


def rankings(sizes: Sequence[int] = (2, 4, 3, 2)) -> list[Atom]:
    """Comparisons of so many answers each, with margins and soft labels."""
    draw, atoms = Random(3), []
    for size, source in zip(sizes, random_atoms(groups=len(sizes), rows=max(sizes)), strict=True):
        margin, confidence = draw.random(), draw.uniform(0.6, 1)
        compared = Compared(
            origin=Origin(source="test", line=1),
            atom=Atom(rows=source.rows[:size]),
            margin=margin,
            confidence=confidence,
        )
        atoms.append(comparison(compared))
    return atoms


def labelled() -> list[Atom]:
    draw = Random(4)
    rows = [row for atom in random_atoms() for row in atom.rows]
    return [
        Atom(rows=(row.with_columns(label=tuple(draw.random() for _ in range(row.trained_count))),)) for row in rows
    ]


def stage(**changes: object) -> RewardModelStage:
    source = {"path": "rows.jsonl"}
    return RewardModelStage.model_validate({"kind": "reward_model", "data": source, **changes})


STAGES = {
    "pairs": stage(centring=0.1),
    "ranking": stage(ranking="plackett_luce"),
    "outcomes": stage(learn="outcomes", every_token=True),
    "steps": stage(learn="steps"),
}


@pytest.mark.parametrize("name", STAGES)
def test_no_cut_changes_the_gradient_or_the_metrics(name: str) -> None:
    config = STAGES[name]
    examples = rankings() if config.learn == "comparisons" else labelled()
    atoms, objective, whole = weighed(examples, config=config), objective_of(config), scalar_trainer()
    metrics = whole.forward_backward(atoms, objective)
    expected = gradients(whole)
    assert all(bool(gradient.abs().max() > 0) for gradient in expected.values())
    for budget in (1, 60, 150):
        cut = scalar_trainer(microbatch_tokens=budget)
        again = cut.forward_backward(atoms, objective)
        assert largest_difference(gradients(cut), expected) < 1e-12
        for metric in ("loss", "accuracy", "score"):
            assert again[metric].mean == pytest.approx(metrics[metric].mean, abs=1e-10)
    rows = [row for atom in atoms for row in atom.rows]
    twice = iter([row.with_columns(weight=tuple(2 * w for w in row.columns["weight"])) for row in rows])
    double = [Atom(rows=tuple(next(twice) for _ in atom.rows)) for atom in atoms]
    whole.forward_backward(double, objective)
    assert largest_difference(gradients(whole), {name: 2 * g for name, g in expected.items()}) < 1e-12


def test_one_forward_of_k_answers_has_the_gradient_of_all_their_pairs() -> None:
    """InstructGPT: 1 / C(K, 2) over the pairs of a prompt, then the mean over prompts."""
    config, trainer = stage(), scalar_trainer()
    (four,) = rankings((4,))
    trainer.forward_backward(weighed([four], config=config), objective_of(config))
    together = gradients(trainer)
    pairs = [Atom(rows=pair) for pair in combinations(four.rows, 2)]
    assert len(pairs) == 6
    trainer.forward_backward(weighed(pairs, config=config), objective_of(config))
    assert largest_difference(gradients(trainer), together) < 1e-12


def test_margins_and_soft_labels_of_the_rows_are_those_of_the_formula() -> None:
    config, trainer = stage(), scalar_trainer()
    row_margin, row_confidence = 0.75, 0.8
    atom = Atom(rows=random_atoms(groups=1, rows=2)[0].rows)
    where = Origin(source="test", line=1)
    pair = comparison(Compared(origin=where, atom=atom, margin=row_margin, confidence=row_confidence))
    (better,), (worse,) = trainer.scores(pair.rows)
    d = better - worse - row_margin
    found = trainer.evaluate(weighed([pair], config=config), objective_of(config))
    assert found["loss"].mean == pytest.approx(-0.8 * log_sigmoid(d) - 0.2 * log_sigmoid(-d))
    assert found["margin"].mean == pytest.approx(better - worse)


def test_labelled_steps_count_the_same_and_so_do_judged_answers() -> None:
    """Answers with 1 and 3 labels: 1/4 for each step; as outcomes 1/2 for each answer."""
    examples = [
        Atom(rows=(TokenRow(tokens=tuple(range(n + 1)), trained=(False, *[True] * n), columns={"label": (1.0,) * n}),))
        for n in (1, 3)
    ]
    for learn, expected in (("steps", [(1 / 4,), (1 / 4,) * 3]), ("outcomes", [(1 / 2,), (1 / 6,) * 3])):
        weights = [atom.rows[0].columns["weight"] for atom in weighed(examples, config=stage(learn=learn))]
        assert weights == [pytest.approx(each) for each in expected]


def test_before_it_has_learnt_every_pair_costs_log_two_and_is_a_tie() -> None:
    trainer = LocalTrainer(load_scalar_model(ModelConfig(path="whet:tiny", create=SHAPE)), TrainConfig())
    plain = [
        comparison(Compared(origin=Origin(source="t", line=1), atom=atom, margin=None, confidence=1.0))
        for atom in random_atoms()
    ]
    found = trainer.evaluate(weighed(plain, config=stage()), objective_of(stage()))
    assert found["loss"].mean == pytest.approx(math.log(2))
    assert (found["accuracy"].mean, found["ties"].mean) == (0.0, 1.0)


def test_a_score_has_read_its_token_and_nothing_after_it() -> None:
    trainer, rows = scalar_trainer(), [row for atom in rankings() for row in atom.rows]
    module = trainer.model.module
    together = trainer.scores(rows)
    module.config._attn_implementation = "sdpa"
    for row, (score,) in zip(rows, together, strict=True):
        assert row.trained.index(True) == len(row.tokens) - 1
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([row.tokens])).logits
        assert score == pytest.approx(float(logits), abs=1e-12)
