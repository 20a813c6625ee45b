"""Preference losses: numbers by hand, finite differences, constants at the reference, and no cut matters."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.laws.support import gradients, largest_difference, logps_of, tiny_trainer
from whet.algorithms.preference import beside_mismatched, check_start, objective_of, preference, weigh_preferences
from whet.config import GeneratedConfig, ModelConfig, TrainConfig
from whet.config.preference import PREFERENCE_PRESETS, LossConfig
from whet.errors import DataError, TrainingError
from whet.formulas import preference as formulas
from whet.formulas.preference import LOSSES, Pairs, kto, log_odds
from whet.launch.world import LocalWorld
from whet.pipeline.load_data import comparisons, judged
from whet.pipeline.reference import with_reference
from whet.records import Atom, TokenRow
from whet.training.answers import tokenise_answers
from whet.training.engine import LocalTrainer

PAIRED = sorted(LOSSES)
STATISTICS = {name: formula.statistic for name, formula in LOSSES.items() if formula.statistic is not None}
every_preset = pytest.mark.parametrize("preset", sorted(PREFERENCE_PRESETS))


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def one_pair(**changed: Tensor) -> Pairs:
    """l_chosen = 1, l_rejected = -1, h = 2; five and four tokens; means -2 and -3.5."""
    pairs = Pairs(
        chosen_P=vector(-10),
        rejected_P=vector(-14),
        ref_chosen_P=vector(-11),
        ref_rejected_P=vector(-13),
        chosen_length_P=vector(5),
        rejected_length_P=vector(4),
        chosen_step_P=vector(0.25),
        rejected_step_P=vector(0.25),
    )
    return replace(pairs, **changed)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigma(x: float) -> float:
    return math.log(sigma(x))


def odds(p: float) -> float:
    return p / (1 - p)


BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "dpo": ({"beta": 0.1, "smoothing": 0.1}, -0.9 * log_sigma(0.2) - 0.1 * log_sigma(-0.2)),
    "robust": ({"beta": 0.1, "smoothing": 0.1}, (-0.9 * log_sigma(0.2) + 0.1 * log_sigma(-0.2)) / 0.8),
    "ipo": ({"beta": 0.1, "average": True}, (1 / 5 + 1 / 4 - 5) ** 2),
    "hinge": ({"beta": 0.1}, 0.8),
    "dpo_norm": ({"beta": 5.0, "smoothing": 0.0}, -log_sigma(5 * (1 / 5 + 1 / 4))),
    "exo": (
        {"beta": 0.1, "smoothing": 1e-3},
        sigma(0.2) * math.log(sigma(0.2) / 0.999) + sigma(-0.2) * math.log(sigma(-0.2) / 0.001),
    ),
    "discopop": (
        {"beta": 0.1, "tau": 0.05},
        -(1 - sigma(4)) * log_sigma(0.2) + sigma(4) * math.exp(-0.2),
    ),
    "f_dpo": (
        {"beta": 0.1, "divergence": "js", "alpha": 0.5},
        -log_sigma(0.1 * (math.log(2 * math.e / (1 + math.e)) - math.log(2 / math.e / (1 + 1 / math.e)))),
    ),
    "apo_zero": ({"beta": 0.1}, 1 - sigma(0.1) + sigma(-0.1)),
    "apo_down": ({"beta": 0.1}, sigma(0.1) + 1 - sigma(0.2)),
    "sppo": ({"beta": 0.1}, (1 - 5) ** 2 + (-1 + 5) ** 2),
    "nca": ({"beta": 0.1}, -log_sigma(0.1) - 0.5 * log_sigma(-0.1) - 0.5 * log_sigma(0.1)),
    "bco": ({"beta": 0.1}, -log_sigma(0.1 * (1 - 0.25)) - log_sigma(-0.1 * (-1 - 0.25))),
    "aot": ({"beta": 0.1, "smoothing": 0.0}, -log_sigma(0.1 * (4 - 0.25))),
    "aot_unpaired": ({"beta": 0.1, "smoothing": 0.0}, -log_sigma(0.1 * (1 - 0.25))),
    "slic": ({"delta": 5.0}, 1.0),
    "simpo": ({"beta": 2.0, "gamma": 1.0, "smoothing": 0.0}, -log_sigma(2 * (-2 + 3.5) - 1)),
    "contrast": ({"beta": 0.1, "smoothing": 0.0}, -log_sigma(0.4)),
    "odds_ratio": ({}, -log_sigma(math.log(odds(math.exp(-2)) / odds(math.exp(-3.5))))),
    "nll": ({}, 2.0),
}


@pytest.mark.parametrize("kind", PAIRED)
def test_a_pair_by_hand(kind: str) -> None:
    constants, expected = BY_HAND[kind]
    assert float(LOSSES[kind].loss(one_pair(), **constants)) == pytest.approx(expected, rel=1e-12)


def test_other_conventions_by_hand() -> None:
    assert float(formulas.ipo(one_pair(), beta=0.1, average=False)) == pytest.approx((2 - 5) ** 2)
    for divergence, slope in (
        ("reverse_kl", math.log),
        ("forward_kl", lambda u: -1 / u),
        ("alpha", lambda u: (1 - u**-0.5) / 0.5),
    ):
        found = float(formulas.f_dpo(one_pair(), beta=0.1, divergence=divergence, alpha=0.5))  # type: ignore[arg-type]
        assert found == pytest.approx(-log_sigma(0.1 * (slope(math.e) - slope(1 / math.e))))


def test_kto_by_hand() -> None:
    found = kto(vector(1, -1), vector(1, 0), vector(0.5, 0.5), beta=0.1, desirable=2, undesirable=3)
    assert found.tolist() == pytest.approx([2 * (1 - sigma(0.05)), 3 * (1 - sigma(0.15))])


def test_odds_are_exact_on_both_ends() -> None:
    for logp in (-1e-4, -0.5, -0.7, -50.0):
        exact = logp - math.log(-math.expm1(logp))
        assert float(log_odds(torch.tensor(logp, dtype=torch.float64))) == pytest.approx(exact, rel=1e-12)
    assert math.isfinite(float(log_odds(torch.tensor(0.0))))


@pytest.mark.parametrize("kind", [kind for kind in PAIRED if kind != "aot_unpaired"])
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    def loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        pairs = one_pair(chosen_P=chosen_P, rejected_P=rejected_P)
        result: Tensor = LOSSES[kind].loss(pairs, **BY_HAND[kind][0])
        return result

    assert torch.autograd.gradcheck(loss, (vector(-10).requires_grad_(), vector(-14).requires_grad_()))


def test_unpaired_aot_is_the_loss_of_both_sides_sorted() -> None:
    better, worse = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    zero = torch.zeros(6, dtype=torch.float64)
    pairs = Pairs(
        chosen_P=better, rejected_P=worse, ref_chosen_P=zero, ref_rejected_P=zero, chosen_length_P=zero + 1,
        rejected_length_P=zero + 1, chosen_step_P=zero, rejected_step_P=zero,
    )  # fmt: skip
    chosen_step, rejected_step = STATISTICS["aot_unpaired"](pairs)
    known = replace(pairs, chosen_step_P=chosen_step.detach(), rejected_step_P=rejected_step.detach())
    found = formulas.aot_unpaired(known, beta=0.5, smoothing=0.0).sum()
    direct = -logsigmoid(0.5 * (better.sort().values - worse.sort().values)).sum()
    ours, theirs = torch.autograd.grad(found, (better, worse)), torch.autograd.grad(direct, (better, worse))
    torch.testing.assert_close(found, direct)
    torch.testing.assert_close(ours, theirs)


def test_statistics_of_the_step_by_hand() -> None:
    """Better answers have log p 3, 1, 2 and 0 under the reference, worse ones 0, 0, 4 and 5, 0, -1."""
    zero = vector(0, 0, 0)
    pairs = Pairs(
        chosen_P=vector(3, 1, 2), rejected_P=vector(0, 0, 4), ref_chosen_P=zero, ref_rejected_P=vector(5, 0, -1),
        chosen_length_P=zero + 1, rejected_length_P=zero + 1, chosen_step_P=zero, rejected_step_P=zero,
    )  # fmt: skip
    found = {kind: [side.tolist() for side in of_step(pairs)] for kind, of_step in STATISTICS.items()}
    assert found["aot"] == [[1, 0, -5], [-1, 0, 5]], "margins 3, 1, -2 meet the reference's -5, 0, 1 of their rank"
    assert found["aot_unpaired"] == [[5, -5, 0], [1, 2, 3]], "l of 3, 1, 2 against -5, 0, 5"
    assert found["bco"] == [[1, 1, 1], [1, 1, 1]], "of all six l"


AT_REFERENCE = {
    "dpo": math.log(2), "robust": math.log(2), "ipo": 25.0, "hinge": 1.0, "dpo_norm": math.log(2),
    "exo": 0.5 * (math.log(0.5 / 0.999) + math.log(0.5 / 0.001)), "discopop": (math.log(2) + 1) / 2,
    "f_dpo": math.log(2), "apo_zero": 1.0, "apo_down": 1.0, "sppo": 2 * 500.0**2, "nca": 2 * math.log(2),
    "bco": 2 * math.log(2), "aot": math.log(2), "aot_unpaired": math.log(2), "kto": 0.5, "cdpo": math.log(2),
}  # fmt: skip
"""What each loss is where the policy is its reference, with the presets' numbers."""


# ------------------------------------------------------------------------------------- with a model


def examples_of(loss: LossConfig, trainer: LocalTrainer, *, answers: int = 2, count: int = 6) -> list[Atom]:
    """Generated comparisons, or judged answers, with the trainer's own weights as the reference."""
    template = LocalWorld().template(ModelConfig(path="whet:tiny"))
    source = GeneratedConfig(generate="arithmetic", answers=answers, count=count, digits=2)
    if loss.kto is None:
        compared = tokenise_answers(comparisons(source)[0], template, max_length=120, on_bad_row="error")[0]
        atoms = [each.atom for each in compared]
    else:
        rows = tokenise_answers(judged(source)[0], template, max_length=120, on_bad_row="error")[0]
        atoms = beside_mismatched(rows, 120)
    if not loss.needs_reference:
        return atoms
    logps = iter(logps_of(trainer, [row for atom in atoms for row in atom.rows]))
    return [Atom(rows=tuple(row.with_columns(ref_logp=next(logps)) for row in atom.rows)) for atom in atoms]


def moved(trainer: LocalTrainer) -> None:
    """Take the weights away from where they were, so that no margin is zero."""
    with torch.no_grad():
        for p in trainer.model.parameters.values():
            p.add_(0.02 * torch.randn_like(p))


@every_preset
def test_no_cut_changes_the_gradient_and_weights_are_linear(preset: str) -> None:
    loss = LossConfig.model_validate(preset)
    whole, cut = tiny_trainer(), tiny_trainer(microbatch_tokens=1)
    answers = 2 if set(loss.terms) & set(STATISTICS) else 4
    examples = examples_of(loss, whole, answers=answers)
    torch.manual_seed(1)
    moved(whole)
    cut.model.module.load_state_dict(whole.model.module.state_dict())
    found = []
    for trainer in (whole, cut):
        atoms = weigh_preferences(examples, loss=loss, trainer=trainer)
        metrics = trainer.forward_backward(atoms, objective_of(loss))
        found.append((metrics, gradients(trainer)))
    (metrics, once), (others, pieces) = found
    assert largest_difference(once, pieces) < 1e-12 * max(1.0, *(float(g.abs().max()) for g in once.values()))
    for name, metric in metrics.items():
        if name != "oom_retries":
            assert metric.mean == pytest.approx(others[name].mean, rel=1e-9, abs=1e-12)
    assert max(float(g.abs().max()) for g in once.values()) > 1e-6
    atoms = weigh_preferences(examples, loss=loss, trainer=whole)
    double = [
        Atom(rows=tuple(row.with_columns(weight=tuple(2 * w for w in row.columns["weight"])) for row in atom.rows))
        for atom in atoms
    ]
    whole.forward_backward(double, objective_of(loss))
    twice = gradients(whole)
    assert largest_difference(twice, {name: 2 * g for name, g in once.items()}) < 1e-9 * max(
        1.0, *(float(g.abs().max()) for g in once.values())
    )


@every_preset
def test_sharing_the_prompt_changes_nothing(preset: str) -> None:
    loss = LossConfig.model_validate(preset)
    trainer = tiny_trainer()
    examples = examples_of(loss, trainer)
    alone = [Atom(rows=tuple(replace(row, shared=0) for row in atom.rows)) for atom in examples]
    moved(trainer)
    found = []
    for atoms in (examples, alone):
        trainer.forward_backward(weigh_preferences(atoms, loss=loss, trainer=trainer), objective_of(loss))
        found.append(gradients(trainer))
    assert largest_difference(*found) < 1e-11 * max(1.0, *(float(g.abs().max()) for g in found[0].values()))


@every_preset
def test_at_the_reference_a_loss_is_its_constant(preset: str) -> None:
    loss = LossConfig.model_validate(preset)
    if not loss.needs_reference or len(loss.terms) > 1:
        return
    trainer = tiny_trainer(dtype=torch.float32)
    examples = examples_of(loss, trainer)
    config = TrainConfig(lr=1e-3, batch_size=4, epochs=1.0)
    first, *_ = preference(trainer, examples, loss, config, seed=0, max_gap=1e-4)
    assert first.metrics["loss"] == pytest.approx(AT_REFERENCE[preset], rel=2e-4)
    assert first.metrics["reference/gap"] < 1e-5


def test_a_policy_that_is_not_its_reference_is_refused() -> None:
    loss = LossConfig.model_validate("dpo")
    trainer = tiny_trainer(dtype=torch.float32)
    examples = examples_of(loss, trainer)
    moved(trainer)
    steps = preference(trainer, examples, loss, TrainConfig(batch_size=4), seed=0, max_gap=1e-3)
    with pytest.raises(TrainingError, match=r"before the first update the policy is .* is dropout on"):
        next(steps)


def test_a_distance_that_is_no_number_is_no_agreement() -> None:
    check_start({"reference/gap": 0.01}, 0.02)
    with pytest.raises(TrainingError, match="nan nats per token"):
        check_start({"reference/gap": math.nan}, 0.02)


def test_four_ranked_answers_are_six_pairs_of_one_atom_and_weigh_as_one_comparison() -> None:
    loss, trainer = LossConfig.model_validate("dpo"), tiny_trainer()
    examples = examples_of(loss, trainer, answers=4, count=2)
    moved(trainer)
    atoms = weigh_preferences(examples, loss=loss, trainer=trainer)
    assert {w for atom in atoms for row in atom.rows for w in row.columns["weight"]} == {1 / 12}
    found = trainer.evaluate(atoms, objective_of(loss))
    by_hand, better = list[float](), list[float]()
    for atom in examples:
        logps = logps_of(trainer, atom.rows)
        ratios = [sum(now) - sum(row.columns["ref_logp"]) for now, row in zip(logps, atom.rows, strict=True)]
        by_hand += [-log_sigma(0.1 * (ratios[i] - ratios[j])) for i in range(4) for j in range(i + 1, 4)]
        better += [0.1 * ratios[i] for i in range(4) for _ in range(i + 1, 4)]
    assert found["loss"].mean == pytest.approx(sum(by_hand) / 12)
    assert found["rewards/chosen"].mean == pytest.approx(sum(better) / 12)
    assert found["rewards/margins"].mean == pytest.approx(found["rewards/chosen"].mean - found["rewards/rejected"].mean)


def test_a_confidence_is_a_share_of_the_pair_the_other_way_round() -> None:
    trainer = tiny_trainer()
    plain, doubting = LossConfig.model_validate("dpo"), LossConfig.model_validate({"dpo": {"smoothing": 0.2}})
    examples = examples_of(plain, trainer)
    moved(trainer)
    sure = [
        Atom(rows=tuple(row.with_columns(confidence=(0.8,) * row.trained_count) for row in atom.rows))
        for atom in examples
    ]
    found = trainer.evaluate(weigh_preferences(sure, loss=plain, trainer=trainer), objective_of(plain))
    other = trainer.evaluate(weigh_preferences(examples, loss=doubting, trainer=trainer), objective_of(doubting))
    assert found["loss"].mean == pytest.approx(other["loss"].mean)


@pytest.mark.parametrize("preset", sorted(STATISTICS))
def test_a_coin_for_a_label_says_the_same_whichever_answer_stands_first(preset: str) -> None:
    """Also where each margin is compared with one of the whole step."""
    trainer, loss = tiny_trainer(), LossConfig.model_validate(preset)
    examples = examples_of(loss, trainer)
    moved(trainer)
    coins = [
        Atom(rows=tuple(row.with_columns(confidence=(0.5,) * row.trained_count) for row in atom.rows))
        for atom in examples
    ]
    swapped = [Atom(rows=atom.rows[::-1]) for atom in coins]
    there, back = (
        trainer.evaluate(weigh_preferences(atoms, loss=loss, trainer=trainer), objective_of(loss))["loss"].mean
        for atoms in (coins, swapped)
    )
    assert there == pytest.approx(back)


def test_mismatched_answers_are_of_another_prompt_and_fit() -> None:
    template = LocalWorld().template(ModelConfig(path="whet:tiny"))
    rows = judged(GeneratedConfig(generate="arithmetic", count=6, digits=2))[0]
    gated = tokenise_answers(rows, template, max_length=120, on_bad_row="error")[0]
    for each, atom in zip(gated, beside_mismatched(gated, 120), strict=True):
        own, foreign = atom.rows
        assert own.tokens.tolist() == each.atom.rows[0].tokens.tolist() and foreign.prompt == own.prompt
        answers = [row.tokens[row.shared :].tolist() for other in gated for row in other.atom.rows]
        assert foreign.tokens[foreign.shared :].tolist() in answers
        assert foreign.tokens.tolist() != own.tokens.tolist()
    with pytest.raises(DataError, match="KTO measures its baseline on answers to other prompts"):
        beside_mismatched(gated[:1], 120)


@pytest.mark.parametrize(("distances", "baseline"), [((2.0, -1.0, 0.5), 0.5), ((-2.0, 1.0, 0.5), 0.0)])
def test_the_baseline_of_kto_is_the_mean_distance_of_mismatched_answers(
    distances: tuple[float, ...], baseline: float
) -> None:
    """How far an answer of one's own is from the reference does not matter, and a negative mean counts as 0."""
    loss, trainer = LossConfig.model_validate("kto"), tiny_trainer()
    atoms = []
    for atom, distance in zip(examples_of(loss, trainer, count=3), distances, strict=True):
        own, foreign = atom.rows
        first, *others = foreign.columns["ref_logp"]
        atoms.append(Atom(rows=(own, foreign.with_columns(ref_logp=(first - distance, *others)))))
    weighed = weigh_preferences(atoms, loss=loss, trainer=trainer)
    assert [atom.rows[0].tokens.tolist() for atom in weighed] == [atom.rows[0].tokens.tolist() for atom in atoms]
    for atom in weighed:
        (row,) = atom.rows
        assert row.columns["baseline"].tolist() == pytest.approx([baseline] * row.trained_count)
        assert row.columns["weight"].tolist() == [1 / 3] * row.trained_count


class Counting:
    """A trainer that knows log p of every token to be -1 / its place, and how often it was asked."""

    asked = 0

    def forward(self, rows: Sequence[TokenRow], want: str) -> dict[str, list[np.ndarray]]:
        self.asked += 1
        return {want: [-1 / np.flatnonzero(row.trained) for row in rows]}


def referring(folder: Path) -> tuple[Any, Any, list[Atom]]:
    """A stage that begins with the model in `folder/model`, a trainer over it, and atoms to refer."""
    context = SimpleNamespace(
        folder=folder,
        checkpoints=folder / "checkpoints",
        model=ModelConfig(path=str(folder / "model")),
        stopped=lambda: False,
    )
    return context, Counting(), [Atom(rows=(TokenRow(tokens=(1, 2, 3), trained=(False, True, True)),))] * 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "none"])
def test_a_damaged_file_of_the_reference_is_computed_again(tmp_path: Path, damage: str) -> None:
    context, trainer, atoms = referring(tmp_path)
    before = list(with_reference(context, lambda: trainer, atoms, "train"))
    (file,) = (tmp_path / "reference" / "train").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    file.write_bytes(data[:-4] if damage == "cut" else data)
    assert list(with_reference(context, lambda: trainer, atoms, "train")) == before
    assert trainer.asked == (1 if damage == "none" else 2)


# ------------------------------------------------------------------------------------- names and values


def test_losses_are_values() -> None:
    for preset in PREFERENCE_PRESETS:
        objective = objective_of(LossConfig.model_validate(preset))
        assert pickle.loads(pickle.dumps(objective)) == objective
