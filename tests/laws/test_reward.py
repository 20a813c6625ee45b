"""Reward models: formulas by hand and by finite differences, and the engine's laws for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.laws.support import SHAPE, _widen_norms, gradients, largest_difference, random_atoms, scores_of
from whet.algorithms.reward_model import comparison, objective_of, rated, scaled, weighed
from whet.algorithms.sequence_sums import pairs_of
from whet.config import ModelConfig, RewardModelStage, TrainConfig
from whet.data.base import Comparison, Origin, Rated
from whet.formulas import reward
from whet.formulas.aggregate import STEPS, pessimistic
from whet.models.armo import Gate, GateFacts
from whet.models.heads import Scale
from whet.models.load import load_scalar_model
from whet.records import Atom, TokenRow
from whet.training.answers import Tokenised
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


def test_what_nobody_rated_costs_nothing_and_teaches_nothing() -> None:
    score = vector(1, 2, 3).requires_grad_()
    loss = reward.rating_loss(score, vector(0.5, math.nan, 5))
    torch.testing.assert_close(loss.detach(), vector(0.25, 0, 4))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(score.grad, vector(1, 0, -4))
    assert reward.rating_loss(vector(math.nan), vector(1.0)).isnan(), "a broken score is no missing rating"


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs": lambda x: reward.bradley_terry(x[:3], x[3:], margin_P=vector(0, 0.5, 1), confidence_P=vector(1, 0.9, 0.4)),
    "centring": lambda x: reward.centring(x[:3], x[3:]),
    "ranking": reward.plackett_luce,
    "labels": lambda x: reward.label_loss(x, vector(0, 1, 0.3, 1, 0, 0.5)),
    "ratings": lambda x: reward.rating_loss(x.view(2, 3), vector(0, math.nan, 0.3, math.nan, math.nan, 2).view(2, 3)),
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


def scalar_trainer(objectives: Sequence[str] = (), **train: object) -> LocalTrainer:
    """A reward model in float64, with a head that is not zero."""
    model = load_scalar_model(ModelConfig(path="whet:tiny", create=SHAPE), objectives=objectives)
    _widen_norms(model.module)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.module.score.weight, std=0.1)
    config = TrainConfig.model_validate({"clip_norm": None, **train})
    return LocalTrainer(replace(model, module=model.module.double()), config)


def compared(rows: Sequence[TokenRow], **said: float) -> Tokenised[Comparison]:
    source = Comparison(origin=Origin(source="test", line=1), prompt=(), answers=((),) * len(rows), **said)  # type: ignore[arg-type]
    return Tokenised(source=source, atom=Atom(rows=tuple(rows)))


def rankings(sizes: Sequence[int] = (2, 4, 3, 2)) -> list[Atom]:
    """Comparisons of so many answers each, with margins and soft labels."""
    draw, atoms = Random(3), []
    for size, source in zip(sizes, random_atoms(groups=len(sizes), rows=max(sizes)), strict=True):
        margin, confidence = draw.random(), draw.uniform(0.6, 1)
        atoms.append(comparison(compared(source.rows[:size], margin=margin, confidence=confidence)))
    return atoms


def labelled() -> list[Atom]:
    draw = Random(4)
    rows = [row for atom in random_atoms() for row in atom.rows]
    return [
        Atom(rows=(row.with_columns(label=tuple(draw.random() for _ in range(row.trained_count))),)) for row in rows
    ]


OBJECTIVES = ("right", "kind", "brief")
SCALES = {"right": Scale(3.0, 0.5), "kind": Scale(0.0, 1.0), "brief": Scale(-2.0, 4.0)}


def answers_rated() -> list[Atom]:
    """Each answer by one to three objectives; none has `brief` alone."""
    draw, found = Random(5), []
    for place, row in enumerate(row for atom in random_atoms() for row in atom.rows):
        ratings = {name: draw.uniform(0, 5) for name in OBJECTIVES[: 1 + place % 3]}
        source = Rated(origin=Origin(source="test", line=1), prompt=(), answer=(), ratings=ratings)
        found.append(scaled(rated(Tokenised(source=source, atom=Atom(rows=(row,))), OBJECTIVES), SCALES))
    return found


def stage(**changes: object) -> RewardModelStage:
    source = {"path": "rows.jsonl"}
    return RewardModelStage.model_validate({"kind": "reward_model", "data": source, **changes})


STAGES = {
    "pairs": stage(centring=0.1),
    "ranking": stage(ranking="plackett_luce"),
    "outcomes": stage(learn="outcomes", every_token=True),
    "steps": stage(learn="steps"),
    "ratings": stage(learn="ratings", objectives=list(OBJECTIVES)),
}


def examples_of(config: RewardModelStage) -> list[Atom]:
    if config.learn == "ratings":
        return answers_rated()
    return rankings() if config.learn == "comparisons" else labelled()


@pytest.mark.parametrize("name", STAGES)
def test_no_cut_changes_the_gradient_or_the_metrics(name: str) -> None:
    config = STAGES[name]
    atoms, objective = weighed(examples_of(config), config=config), objective_of(config)
    whole = scalar_trainer(config.objectives)
    metrics = whole.forward_backward(atoms, objective)
    expected = gradients(whole)
    assert all(bool(gradient.abs().max() > 0) for gradient in expected.values())
    for budget in (1, 60, 150):
        cut = scalar_trainer(config.objectives, microbatch_tokens=budget)
        again = cut.forward_backward(atoms, objective)
        assert largest_difference(gradients(cut), expected) < 1e-12
        assert again.keys() == metrics.keys()
        for metric in metrics.keys() - {"oom_retries"}:
            assert again[metric].mean == pytest.approx(metrics[metric].mean, abs=1e-10)
    rows = [row for atom in atoms for row in atom.rows]
    twice = iter([row.with_columns(weight=tuple(2 * w for w in row.columns["weight"])) for row in rows])
    double = [Atom(rows=tuple(next(twice) for _ in atom.rows)) for atom in atoms]
    whole.forward_backward(double, objective)
    assert largest_difference(gradients(whole), {name: 2 * g for name, g in expected.items()}) < 1e-12


def test_every_rating_counts_the_same_and_the_loss_of_the_mean_is_its_variance() -> None:
    """A head of zeros says the mean: its loss is the mean of all squared ratings, in units of their scale."""
    config = STAGES["ratings"]
    atoms = answers_rated()
    trainer = LocalTrainer(
        load_scalar_model(ModelConfig(path="whet:tiny", create=SHAPE), objectives=OBJECTIVES), TrainConfig()
    )
    found = trainer.evaluate(weighed(atoms, config=config), objective_of(config))
    for name in OBJECTIVES:
        ratings = [x for atom in atoms if math.isfinite(x := atom.rows[0].columns[f"rating/{name}"][0])]
        assert found[f"loss/{name}"].mean == pytest.approx(sum(x * x for x in ratings) / len(ratings), rel=1e-5)
    every = [x for atom in atoms for (x,) in atom.rows[0].columns.values() if math.isfinite(x)]
    assert found["loss"].mean == pytest.approx(sum(x * x for x in every) / len(every), rel=1e-5)
    assert found["loss"].weight == pytest.approx(1)


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
    rows = random_atoms(groups=1, rows=2)[0].rows
    pair = comparison(compared(rows, margin=row_margin, confidence=row_confidence))
    ((better,),), ((worse,),) = scores_of(trainer, pair.rows)
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
    plain = [comparison(compared(atom.rows)) for atom in random_atoms()]
    found = trainer.evaluate(weighed(plain, config=stage()), objective_of(stage()))
    assert found["loss"].mean == pytest.approx(math.log(2))
    assert (found["accuracy"].mean, found["ties"].mean) == (0.0, 1.0)


def test_a_score_has_read_its_token_and_nothing_after_it() -> None:
    trainer, rows = scalar_trainer(), [row for atom in rankings() for row in atom.rows]
    module = trainer.model.module
    together = scores_of(trainer, rows)
    module.config._attn_implementation = "sdpa"
    for row, ((score,),) in zip(rows, together, strict=True):
        assert row.trained.argmax() == len(row.tokens) - 1
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([row.tokens.tolist()])).logits
        assert score == pytest.approx(float(logits), abs=1e-12)


# -------------------------------------------------------------------------------------------------- a gate


def test_what_is_debiased_goes_with_nothing_any_more() -> None:
    torch.manual_seed(3)
    length_N = torch.randn(200, dtype=torch.float64) * 9 + 30
    score_NK = torch.randn(200, 3, dtype=torch.float64) + length_N[:, None] * vector(0.1, 0, -2)
    found_K = reward.slopes(score_NK, length_N)
    kept_NK = reward.debiased(score_NK, length_N - length_N.mean(), slope_K=found_K)
    for k in range(3):
        assert abs(float(torch.corrcoef(torch.stack([kept_NK[:, k], length_N]))[0, 1])) < 1e-12
    assert reward.slopes(score_NK, score_NK[:, 1])[1] == pytest.approx(1), "of the objective itself nothing is left"
    assert not reward.slopes(score_NK, torch.ones(200, dtype=torch.float64)).any()


def test_a_gate_by_hand() -> None:
    scores, gates = vector(1, 3, -1, 2).view(2, 2), vector(0.25, 0.75, 1, 0).view(2, 2)
    torch.testing.assert_close(reward.gated(scores, gates, scale=2.0), vector(5, -2))


@pytest.mark.parametrize(
    ("debias", "kept"),
    [
        (None, (1.0, 10.0)),
        ("length", (1 - 2 * (4 - 2), 10.0)),  # the first score is twice the length, whose mean is 2; the other is not
        ("brief", (1 - 1 * (10 - 4), 10.0 - 1 * (10 - 4))),  # the first goes with the second, whose mean is 4
    ],
)
def test_what_a_gate_says_by_hand(debias: str | None, kept: tuple[float, float]) -> None:
    gate = Gate(GateFacts(hidden=2, temperature=2.0, debias=debias), ("right", "brief"), 2).double()
    assert gate.first is not None
    gate.load_state_dict(
        gate.state_dict()
        | {
            "first.weight": vector(1, 0, 0, -1).view(2, 2),
            "first.bias": vector(0, 0),
            "last.weight": torch.eye(2, dtype=torch.float64),
            "log_scale": vector(math.log(3)),
        }
    )
    fitted = vector(2, 4, 6, 4) if debias == "length" else vector(2, 2, 6, 6)
    gate.debias(fitted.view(2, 2), vector(1, 3))
    # The state (3, 4) has the root mean square sqrt(12.5), whatever its length; gelu(x) is x times the normal's
    # distribution function at x.
    seen = [x / math.sqrt(12.5) for x in (3, -4)]
    first, second = (math.exp(x * (1 + math.erf(x / math.sqrt(2))) / 2 / 2) for x in seen)
    weights = first / (first + second), second / (first + second)
    said = gate(vector(3, 4, 30, 40).view(2, 2), vector(1, 10, 1, 10).view(2, 2), vector(4, 4))
    expected = 3 * (weights[0] * kept[0] + weights[1] * kept[1])
    for each in said.tolist():
        assert each == pytest.approx([expected, 1, 10, *weights], rel=1e-5)


def gate_trainer(debias: str | None = None, **train: object) -> LocalTrainer:
    """A gate in float64 over a frozen model of three objectives."""
    frozen = scalar_trainer(OBJECTIVES, **train).model
    frozen.module.requires_grad_(False)
    torch.manual_seed(2)
    gate = Gate(GateFacts(hidden=5, temperature=2.0, debias=debias), OBJECTIVES, frozen.module.score.weight.shape[1])
    torch.nn.init.normal_(gate.last.weight)
    model = replace(frozen, gate=gate.double())
    return LocalTrainer(model, TrainConfig.model_validate({"clip_norm": None, **train}))


def test_only_a_gate_is_trained_and_every_part_of_it() -> None:
    config, trainer, atoms = stage(), gate_trainer("length"), rankings()
    for said in trainer.forward([row for atom in atoms for row in atom.rows], "score")["score"]:
        assert said.shape == (1, 1 + 2 * len(OBJECTIVES)) and said[0, 4:].sum() == pytest.approx(1)
    assert set(trainer.model.parameters) == {f"gate.{name}" for name, _ in trainer.model.gate.named_parameters()}
    trainer.forward_backward(weighed(atoms, config=config), objective_of(config))
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients(trainer).values())
    assert all(p.grad is None for p in trainer.model.module.parameters())


def test_what_a_gate_reads_does_not_depend_on_what_stands_beside() -> None:
    """Nor on where the row is cut: the prompt is what the row says, the length what follows it."""
    row = rankings()[0].rows[0]
    other = replace(row, tokens=[row.tokens[0] + 1, *row.tokens[1:]])
    longer = replace(row, shared=row.shared + 1)
    rows = [row, other, longer, *(row for atom in rankings() for row in atom.rows)]
    together, alone = (
        scores_of(gate_trainer("brief"), rows),
        scores_of(gate_trainer("brief", microbatch_tokens=1), rows),
    )
    assert len({said for said, *_ in together[:3]}) == 3
    for (first,), (second,) in zip(together, alone, strict=True):
        assert first == pytest.approx(second, abs=1e-12)


def test_a_new_gate_weighs_all_alike_and_survives_its_file(tmp_path: Path) -> None:
    facts = GateFacts(hidden=4, temperature=10.0, debias=None)
    gate = Gate(facts, OBJECTIVES, 8)
    state, score = torch.randn(6, 8), torch.randn(6, 3)
    said = gate(state, score, torch.ones(6))
    torch.testing.assert_close(said[:, 4:], torch.full((6, 3), 1 / 3))
    torch.testing.assert_close(said[:, 0], score.mean(1))
    gate.export(tmp_path)
    other = Gate(facts, OBJECTIVES, 8)
    other.load_state_dict(load_file(tmp_path / "gate.safetensors"))
    torch.testing.assert_close(other(state, score, torch.ones(6)), said, rtol=0, atol=0)
