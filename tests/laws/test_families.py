"""What is exported is what was trained and what was sampled, for every family that loads and every LoRA target.

The models are tiny, from configurations (`tests.families`), with weights so large that a wrong layer shows. Each is
compared with transformers' own forward pass of each row alone, and with peft's reading of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, HEADLESS, NOISE, REFUSED, WRAPPERS, make, make_wrapper, table
from whet.config import LoraConfig, ModelConfig, TrainConfig
from whet.errors import ModelError
from whet.models.language import LanguageModel, pack
from whet.models.load import load_model, load_scalar_model, read_max_length
from whet.records import Atom, Completion, TokenRow
from whet.sampling.base import Request, SamplingParams, run, sample_all
from whet.sampling.embedded import EmbeddedSampler
from whet.training.engine import LocalTrainer

TRAINED = [name for name in FAMILIES if name not in REFUSED]
PROMPTS = [tuple(range(40, 40 + length)) for length in (3, 21, 9)]
ANSWERS = [(101, 7, 33, 90, 12), (65, 66), tuple(range(110, 140))]


def row_of(prompt: tuple[int, ...], answer: tuple[int, ...]) -> TokenRow:
    return TokenRow(tokens=(*prompt, *answer), trained=(False,) * len(prompt) + (True,) * len(answer))


ROWS = [row_of(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
STOPS = frozenset({258, 263})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes each family's directory once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("family"))
        return made[name]

    return folder


def load(
    folder: Path, targets: Any = None, *, quantised: bool = False, tokens: tuple[str, ...] | None = None, **more: Any
) -> LanguageModel:
    """The model with an adapter of random weights, both halves of it, where targets are given."""
    lora = None if targets is None else LoraConfig(rank=2, alpha=4, targets=targets, **more)
    config = ModelConfig(path=str(folder), device="cpu", add_tokens=tokens)
    model = load_model(config, lora=lora, quantised=quantised, stop_ids=STOPS)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters.values() if lora else ():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    return model


def by_whet(model: LanguageModel, rows: Sequence[TokenRow] = tuple(ROWS)) -> torch.Tensor:
    """log p of all trained tokens, packed into one micro-batch."""
    found = LocalTrainer(model, TrainConfig()).forward(rows, "logp")["logp"]
    return torch.tensor([logp for row in found for logp in row.tolist()])


def by_transformers(module: Any, rows: Sequence[TokenRow] = tuple(ROWS), *, grad: bool = False) -> torch.Tensor:
    """The same by the module's own forward pass of each row alone."""
    found = []
    for row in rows:
        tokens = torch.tensor([list(row.tokens)])
        with torch.set_grad_enabled(grad):
            logp = module.eval()(input_ids=tokens).logits[0].float().log_softmax(-1)
        at = torch.tensor(list(row.trained)).nonzero()[:, 0]
        found.append(logp[at - 1].gather(-1, tokens[0, at, None])[:, 0])
    return torch.cat(found)


def read_back(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    module, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return module


@pytest.mark.parametrize("name", TRAINED)
def test_a_packed_row_is_computed_as_transformers_computes_it_alone(folders: Any, name: str) -> None:
    model = load(folders(name))
    torch.testing.assert_close(by_whet(model), by_transformers(read_back(folders(name))), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_is_that_of_the_rows_alone(folders: Any, name: str) -> None:
    """Two answers share their prompt, and another row stands beside them."""
    first, second = (
        TokenRow(tokens=row.tokens, trained=row.trained, shared=len(PROMPTS[1]))
        for row in (ROWS[1], row_of(PROMPTS[1], ANSWERS[0]))
    )
    model = load(folders(name))
    packed = pack([Atom(rows=(first, second)), Atom(rows=(ROWS[2],))], model.device, model.backend)
    model.module.train()
    logp_T, _ = model.logp_at(model.stream(packed)[packed.source_T], packed.target_T, temperature=1.0)
    logp_T.sum().backward()
    module = read_back(folders(name))
    by_transformers(module, [first, second, ROWS[2]], grad=True).sum().backward()
    for (key, ours), theirs in zip(model.module.named_parameters(), module.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), key
        else:
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3 * scale + 1e-6, rtol=1e-2, msg=key)


@pytest.mark.parametrize("name", TRAINED)
def test_the_sampler_says_of_its_tokens_what_the_trainer_says_of_them(folders: Any, name: str) -> None:
    model = load(folders(name))
    params = SamplingParams(max_tokens=12, temperature=1.0)
    asked = [
        Request(prompt=prompt, seed=10 * at + n, params=params) for n in range(2) for at, prompt in enumerate(PROMPTS)
    ]
    answers = run(sample_all(EmbeddedSampler(model), asked))
    written = [answer for answer in answers if isinstance(answer, Completion)]
    assert len(written) == len(asked)
    rows = [row_of(tuple(r.prompt), tuple(a.tokens)) for r, a in zip(asked, written, strict=True)]
    said = torch.tensor([logp for answer in written for logp in answer.logprobs.tolist()])
    torch.testing.assert_close(said, by_whet(model, rows), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["full", "all-linear"])
def test_an_export_computes_what_was_trained(folders: Any, name: str, targets: Any, tmp_path: Path) -> None:
    check_export(load(folders(name), targets), folders(name), tmp_path)


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "Gemma 2", "GPT-2", "DeepSeek V3"])
def test_an_adapter_over_four_bits_is_exported_in_full_precision(folders: Any, name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'whet[quant]'")
    model = load(folders(name), "all-linear", quantised=True)
    expected = by_whet(model)
    model.export(tmp_path)
    torch.testing.assert_close(by_transformers(read_back(tmp_path)), expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_a_scalar_head_is_exported_as_it_was_or_refused(folders: Any, name: str, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, alpha=4)
    if name in HEADLESS:
        with pytest.raises(ModelError, match="transformers has no sequence classifier over"):
            load_scalar_model(ModelConfig(path=str(folders(name)), device="cpu"))
        return
    model = load_scalar_model(ModelConfig(path=str(folders(name)), device="cpu"), lora=lora)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters.values():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    model.export(tmp_path)
    again = load_scalar_model(ModelConfig(path=str(tmp_path), device="cpu"))
    found, expected = (
        torch.tensor(LocalTrainer(each, TrainConfig()).forward([ROWS[1]], "score")["score"][0])
        for each in (again, model)
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Granite", "Gemma 2"])
def test_an_adapter_on_a_head_or_an_embedding_is_exported(
    name: str, targets: list[str], tied: bool, tmp_path: Path
) -> None:
    base = make(name, tmp_path / "base", tie_word_embeddings=tied)
    check_export(load(base, targets), base, tmp_path / "out")


ENDS = {"GPT-2": ["wte", "lm_head"], "GPT-NeoX, Pythia": ["embed_in", "lm_head"]}
"""What the embedding and the head are called where it is not `embed_tokens` and `lm_head`."""


@pytest.mark.parametrize("kind", ["dora", "rslora", "modules_to_save", "add_tokens"])
@pytest.mark.parametrize("name", ["Llama", "Qwen 3", "Gemma 2", "GPT-2", "GPT-NeoX, Pythia", "OPT"])
def test_every_kind_of_adapter_and_a_new_token_are_exported(folders: Any, name: str, kind: str, tmp_path: Path) -> None:
    base, more = folders(name), {kind: True} if kind in ("dora", "rslora") else {}
    tokens = ("<plan>",) if kind == "add_tokens" else None
    if not more:
        more = {"modules_to_save": ENDS.get(name, ["embed_tokens", "lm_head"])}
    model = load(base, "all-linear", tokens=tokens, **more)
    if tokens:
        load(base, tokens=tokens).export(tmp_path / "grown")  # peft's files have no rows that the base lacks
        base = tmp_path / "grown"
    check_export(model, base, tmp_path / "out")
    if tokens:
        (new,) = model.tokenizer(*tokens, add_special_tokens=False)["input_ids"]
        row = [TokenRow(tokens=(*PROMPTS[0], new, 7, new), trained=(False,) * 3 + (True,) * 3)]
        again = load_model(ModelConfig(path=str(tmp_path / "out")))
        assert again.tokenizer(*tokens, add_special_tokens=False)["input_ids"] == [new]
        torch.testing.assert_close(by_whet(again, row), by_whet(model, row), atol=5e-4, rtol=1e-3)
        torch.testing.assert_close(
            by_transformers(read_back(tmp_path / "out"), row), by_whet(model, row), atol=5e-4, rtol=1e-3
        )


@pytest.mark.parametrize("name", ["Mixtral", "Llama 4, text", "OPT"])
def test_every_target_is_refused_or_exported(folders: Any, name: str, tmp_path: Path) -> None:
    """Every name of a module or a parameter, by itself, as `train.lora.targets`."""
    module = load(folders(name)).module
    paths = [path for named in (module.named_modules(), module.named_parameters()) for path, _ in named]
    names = {path.rpartition(".")[2] for path in paths} - {"", *map(str, range(9))}
    exported, refused = 0, []
    for target in sorted(names):
        try:
            model = load(folders(name), [target])
        except ModelError as refusal:
            refused.append(str(refusal))
        else:
            check_export(model, folders(name), tmp_path / target)
            exported += 1
    assert exported >= 4 and all(line.startswith("train.lora.targets: ") for line in refused)


def check_export(model: LanguageModel, base: Path, out: Path, *, peft: bool = True) -> None:
    """The export by transformers, and the adapter by peft, give what whet computes; nothing in memory changes."""
    from peft import PeftModel

    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    expected = by_whet(model)
    model.export(out)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    module = read_back(out)
    torch.testing.assert_close(by_transformers(module), expected, atol=5e-4, rtol=1e-3)
    assert set(module.generation_config.eos_token_id) >= STOPS
    if model.adapter is not None and peft:
        plain = read_back(base)
        assert (by_transformers(plain) - expected).abs().max() > 1e-3, "the adapter does something"
        adapted = PeftModel.from_pretrained(plain, out / "adapter")
        torch.testing.assert_close(by_transformers(adapted), expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.05, 4.0])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_for_its_reason_however_small_its_weights(
    name: str, scale: float, tmp_path: Path
) -> None:
    if REFUSED[name] == NOISE:  # found by computing, at the scale of a fresh model or above
        scale = max(scale, 1.0)
    with pytest.raises(ModelError, match=REFUSED[name]) as refusal:
        load(make(name, tmp_path, scale=scale))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", WRAPPERS)
def test_of_a_model_of_text_and_images_the_text_model_is_trained_and_exported(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = make_wrapper(name, tmp_path / "base")
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    model = load(folder)
    assert "only its text model is trained and exported" in caplog.text
    torch.testing.assert_close(by_whet(model), by_transformers(whole), atol=2e-4, rtol=1e-4)
    check_export(load(folder, ["q_proj", "v_proj"]), folder, tmp_path / "out", peft=False)


def test_missing_weights_are_an_error_and_never_random_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make("Llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are missing for model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("GPT-2", "attn_pdrop"),
        ("GPT-2", "embd_pdrop"),
        ("Seed-OSS", "residual_dropout"),
    ],
)
def test_dropout_of_the_configuration_is_off_and_said(
    name: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(make(name, tmp_path, **{key: 0.5}))
    assert "trained without dropout (its configuration has" in caplog.text and f"{key}: 0.5" in caplog.text
    quiet = by_whet(model)
    model.module.train()
    torch.testing.assert_close(by_whet(model), quiet, atol=0, rtol=0)


def test_noise_that_is_no_dropout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=NOISE):
        load(make("Mixtral", tmp_path, router_jitter_noise=0.1))


def test_a_longrope_model_takes_rows_that_its_short_angles_reach(
    folders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
    }
    rope["original_max_position_embeddings"] = 32
    folder = make("Phi-3, Phi-4", tmp_path, rope_parameters=rope, original_max_position_embeddings=32)
    assert load(folder).max_length == read_max_length(ModelConfig(path=str(folder))) == 32
    assert "takes rows of up to 32 tokens; longer ones have other rotary angles" in caplog.text
    assert load(folders("Llama 4, text")).max_length == 64


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_row_has_its_own_angles_beside_longer_and_shorter_ones(kind: str, tmp_path: Path) -> None:
    """`dynamic` takes others for all tokens of a row beyond max_position_embeddings: no row may be longer."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = make("Llama", tmp_path, max_position_embeddings=64, rope_parameters=rope)
    model = load(folder)
    rows = [*ROWS, row_of(tuple(range(40, 74)), tuple(range(100, 130)))]
    assert model.max_length == len(rows[-1].tokens) == 64
    own = by_transformers(read_back(folder), rows)
    torch.testing.assert_close(by_whet(model, rows), own, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(by_whet(model, rows[::-1][1:]), by_transformers(read_back(folder), rows[::-1][1:]))


def test_the_page_on_models_lists_what_these_laws_hold_for() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert table() in page, "write the result of tests.families.table() into docs/models.md"
