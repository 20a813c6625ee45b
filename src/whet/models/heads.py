"""Scalar heads: numbers for a state, read off its last hidden state by a linear map without a bias.

Read before an action it is the value of the state (PPO's critic); read at the last token of an answer it is a reward,
or one for each of several objectives. All are the same module, `score`, where transformers' sequence classifiers have
it with a label for each output, so a directory that we write loads there, and a reward model from there loads here. A
model may be a trunk with `score` alone, or a causal LM with `score` beside its vocabulary (policy and critic on one
trunk).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from whet.errors import ModelError
from whet.files import read_json, write_atomic
from whet.models.architecture import text_config
from whet.models.armo import GateFacts

SCORE = "score"
FACTS = "whet_reward"
"""Key of a model's config under which `RewardFacts` travel with it."""


class Scale(NamedTuple):
    """What ratings by one objective are like."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFacts:
    """What the raw numbers of a reward model mean. A model that does not say so is taken at its word."""

    reads: Literal["answers", "steps"] = "answers"
    """Whether a score stands at the end of an answer, or also at the ends of its steps."""
    link: Literal["identity", "sigmoid"] = "identity"
    """identity: differences are log-odds of being preferred. sigmoid: the log-odds of being right."""
    mean: float = 0.0
    """Subtracted from the raw score (identity)."""
    std: float = 1.0
    """What the difference is divided by."""
    ratings: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """For each objective the `Scale` of the ratings that it was taught: an output of 0 is their mean, and of 1 is one
    standard deviation above it."""
    gate: GateFacts | None = None
    """The gate that weighs the objectives, where there is one: the score is what it makes of them."""


def reward_facts(module: Any) -> RewardFacts | None:
    """What a scalar model says of itself; None where it says nothing."""
    noted = getattr(module.config, FACTS, None)  # transformers keeps unknown keys of a config as attributes
    if noted is None:
        return None
    gate = GateFacts(**noted["gate"]) if noted.get("gate") else None
    return RewardFacts(**{**noted, "gate": gate})


def set_reward_facts(module: Any, facts: RewardFacts) -> None:
    """Note the facts in the config of a model in memory: its export then has them."""
    setattr(module.config, FACTS, asdict(facts))


def note_reward_facts(folder: Path, facts: RewardFacts) -> None:
    """Write the facts into the config of an exported model; a gate and the ratings below it are kept."""
    config = read_json(folder / "config.json")
    before = config.get(FACTS, {})
    if before.get("gate"):
        facts = replace(facts, gate=GateFacts(**before["gate"]), ratings=before["ratings"])
    write_atomic(folder / "config.json", json.dumps({**config, FACTS: asdict(facts)}, indent=2).encode())


def objectives_of(module: Any) -> tuple[str, ...]:
    """The names of a head's outputs, in order; none where it has one output, which is the score."""
    outputs = module.score.weight.shape[0]
    return tuple(module.config.id2label[place] for place in range(outputs)) if outputs > 1 else ()


def objectives_in(folder: Path) -> tuple[str, ...]:
    """The same of an exported model, from its config alone."""
    labels = read_json(folder / "config.json")["id2label"]
    return tuple(labels[str(place)] for place in range(len(labels))) if len(labels) > 1 else ()


def load_scalar(where: str, *, config: Any, objectives: Sequence[str] = (), **options: Any) -> Any:
    """A transformers sequence classifier from a directory or hub id, with an output for each of the objectives.

    Without `objectives` it has the outputs that its own head has, or one. Where the weights are a causal LM's, its
    trunk is taken and `score` starts at zero: every value is 0, so the first advantages are plain returns. Raises
    `ModelError` if the trunk is incomplete, and whatever transformers raises.
    """
    from transformers import AutoModelForSequenceClassification

    if type(config) not in AutoModelForSequenceClassification._model_mapping or text_config(config) is not config:
        raise ModelError(
            f"{where}: transformers has no sequence classifier over {config.model_type}, so it cannot carry a scalar "
            "head; begin a reward model or a critic from another model"
        )
    if objectives or not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        for key, value in _labels(objectives).items():
            setattr(config, key, value)
    module, found = AutoModelForSequenceClassification.from_pretrained(
        where, config=config, output_loading_info=True, **options
    )
    missing = set(found["missing_keys"])
    if missing == {f"{SCORE}.weight"}:
        nn.init.zeros_(module.score.weight)
    elif missing:
        raise ModelError(
            f"{where}: weights are missing for {', '.join(sorted(missing)[:3])}; it cannot carry a scalar head"
        )
    return module


def _labels(objectives: Sequence[str]) -> dict[str, Any]:
    """What a classifier's config says of its outputs: one without a name of its own where there are no objectives."""
    names = list(objectives) or ["LABEL_0"]
    return {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}


def scalar_from_causal(module: Any, objectives: Sequence[str] = ()) -> Any:
    """A sequence classifier over the trunk of a causal LM in memory (copied), its outputs as above; `score` is 0."""
    from transformers import AutoModelForSequenceClassification

    config = type(module.config).from_dict({**module.config.to_dict(), **_labels(objectives)})
    scalar = AutoModelForSequenceClassification.from_config(config)
    scalar.base_model.load_state_dict(module.base_model.state_dict())
    nn.init.zeros_(scalar.score.weight)
    return scalar


def add_score(module: Any) -> None:
    """Put a scalar head beside the vocabulary of a causal LM, in place: a critic on the policy's own trunk."""
    weight = module.get_input_embeddings().weight
    module.score = nn.Linear(module.config.get_text_config().hidden_size, 1, bias=False)
    module.score.to(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    nn.init.zeros_(module.score.weight)


def is_scalar(module: Any) -> bool:
    """Whether the model has a scalar head and no vocabulary."""
    return module.get_output_embeddings() is None
