"""Where rows come from: files, the hub, or a task family that generates them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from whet.config.strict import Made, Strict


class DataConfig(Strict):
    """Rows from a file, a folder or the hub; the format is detected by the columns."""

    refers_to: ClassVar[Made | None] = "rows"
    path: str
    """A `.jsonl`, `.json`, `.parquet`, `.arrow`, `.csv` or `.tsv` file (`.gz` too), a folder of them, a `datasets`
    directory, a hub id, `@stage` (the rows that an earlier stage made), or a Python program that prints a JSON object a
    line and gets `split` as its argument; set `limit` where it never ends."""
    subset: str | None = None
    """Configuration of a hub data set (`main` for GSM8K)."""
    split: str = "train"
    format: Literal[
        "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "prompt",
        "pair", "openai_preference", "ranked",
    ] = "auto"  # fmt: skip
    columns: dict[str, str] = {}
    """Our name: your column (`{prompt: question, completion: answer}`), a path into one (`completions[].response`,
    `choices[0].text`), or a text with `{column}` in braces."""
    system: str | None = None
    """A system message put before every conversation that has none."""
    limit: int | None = Field(None, ge=1)
    streaming: bool = False
    """Read a hub data set while it is fetched, up to `limit` usable rows, and download no more of it."""
    on_bad_row: Literal["error", "drop"] = "error"
    """drop: leave unusable rows out; how many and why is printed; each stands in the stage's `dropped/`."""


class GeneratedConfig(Strict):
    """Rows that a task family of `envs.families` generates; the same seed gives the same rows."""

    on_bad_row: ClassVar[Literal["error"]] = "error"
    generate: Literal["arithmetic", "countdown", "functions"]
    count: int = Field(4096, ge=1)
    seed: int = 0
    split: Literal["train", "test"] = "train"
    """test: the tenth of all problems that is held out; a hash of the problem decides, so no seed can mix them."""
    digits: int = Field(3, ge=1, le=6)
    """arithmetic: most digits of a number."""
    bare: float = Field(0.0, ge=0, le=1)
    """arithmetic and functions, demonstrations: the share that only states the answer; the others show their steps."""
    plain: bool = False
    """arithmetic demonstrations: running text for pre-training, without chat turns."""
    answers: int = Field(2, ge=2, le=4)
    """comparisons: ranked answers to each problem, of four kinds: right with steps, right, wrong with steps, wrong."""
    style_instructions: bool = False
    """arithmetic: every prompt asks for the columns (`show`) or to do without (`brief`), half of them each; what an
    answer is worth, and the order of comparisons, depend on it."""
    question: str = "{}"
    """arithmetic: how a prompt asks for the sum that stands in place of `{}` (`What is {}?`)."""
    numbers: int = Field(3, ge=2, le=6)
    """countdown: how many numbers may be used."""

    @model_validator(mode="after")
    def _check(self) -> GeneratedConfig:
        for key, used in (("style_instructions", self.style_instructions), ("question", self.question != "{}")):
            if used and self.generate != "arithmetic":
                raise ValueError(f"{key} needs generate: arithmetic (got {self.generate}); remove it")
        if self.question.count("{}") != 1:
            raise ValueError(f"question {self.question!r} has no place for the sum; write {{}} there, once")
        return self


class WeightedData(DataConfig):
    """One of several data sets."""

    weight: float | None = Field(None, gt=0)
    """Its share of the samples, over the sum of all weights. None (for all sets): every row counts the same."""


class WeightedGenerated(GeneratedConfig):
    """One of several data sets."""

    weight: float | None = Field(None, gt=0)
    """Its share of the samples, over the sum of all weights. None (for all sets): every row counts the same."""


def _source(value: Any) -> str:
    generated = "generate" in value if isinstance(value, dict) else isinstance(value, GeneratedConfig)
    return "generated" if generated else "rows"


def _sources(value: Any) -> str:
    return "sets" if isinstance(value, list) else _source(value)


_OneSet = Annotated[DataConfig, Tag("rows")] | Annotated[GeneratedConfig, Tag("generated")]
Source = Annotated[_OneSet, Discriminator(_source)]
Weighted = Annotated[
    Annotated[WeightedData, Tag("rows")] | Annotated[WeightedGenerated, Tag("generated")], Discriminator(_source)
]
Sources = Annotated[
    _OneSet | Annotated[list[Weighted], Tag("sets"), Field(min_length=1)],
    Discriminator(_sources),
]
"""A data set, or a list of them."""


def listed(sources: Sources) -> Sequence[DataConfig | GeneratedConfig]:
    """One data set, or several, as a list."""
    return sources if isinstance(sources, list) else [sources]


def weights(sources: Sources) -> tuple[float, ...]:
    """Those of a list; empty where there are none. Raises `ValueError` where only some have one."""
    given = [source.weight for source in sources] if isinstance(sources, list) else []
    found = tuple(weight for weight in given if weight is not None)
    if found and len(found) < len(given):
        raise ValueError(f"data.{given.index(None)} has no weight, and others have one; give all of them one or none")
    return found
