"""Second moments, the choice of P, and the artefact's guard against another backbone."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemst.backbone import add_item_tokens
from gemst.config import NullSpace
from gemst.errors import GemstError
from gemst.evaluation.drift import drift
from gemst.files import read_json, write_json
from gemst.tuning import null_space
from gemst.tuning.subspace import matching
from tests.tuning.conftest import ITEMS, WORDS, gpt2, llama, t5
from tests.tuning.test_subspace import PATTERN

TEXTS = ["the good old comedy , a bad new film . History : drama"] * 40


def collect(model, tokenizer, tokens: int = 200):
    modules = matching(model, PATTERN)
    return modules, null_space.second_moments(model, modules, null_space.batches(tokenizer, TEXTS, tokens, 20))


def test_a_bf16_pass_gives_the_same_moments_up_to_its_rounding(tokenizer) -> None:
    model = llama()
    modules, exact = collect(model, tokenizer)
    stream = null_space.batches(tokenizer, TEXTS, 200, 20)
    rounded = null_space.second_moments(model, modules, stream, precision="bf16-autocast")
    away = {site: float((rounded.sums[site] - sums).norm() / sums.norm()) for site, sums in exact.sums.items()}
    assert 1e-5 < max(away.values()) < 0.02  # bf16 it was, in the forward pass alone
    assert all(sums.dtype == torch.float64 for sums in rounded.sums.values())


@pytest.mark.parametrize("make", [llama, t5, gpt2])
def test_moments_equal_a_direct_sum_and_sites_are_shared(make, tokenizer) -> None:
    model = make()
    modules, moments = collect(model, tokenizer)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_pre_hook(
            lambda _, x, n=n: seen.__setitem__(
                n, seen.get(n, 0) + x[0].flatten(0, -2).double().t() @ x[0].flatten(0, -2).double()
            )
        )
        for n, m in modules.items()
    ]
    with torch.no_grad():
        for batch in null_space.batches(tokenizer, TEXTS, 200, 20):
            behind = torch.nn.functional.pad(batch["input_ids"][:, :-1], (1, 0), value=0)  # the decoder's start token
            extra = {"decoder_input_ids": behind} if model.config.is_encoder_decoder else {}
            model.base_model(**batch, **extra)
    for handle in handles:
        handle.remove()
    assert set(moments.site_of) == set(modules)
    assert moments.tokens == 200
    for name in modules:
        torch.testing.assert_close(moments.sums[moments.site_of[name]], seen[name], rtol=1e-4, atol=1e-4)
    assert (
        len(moments.sums) == len(modules) if make is gpt2 else len(moments.sums) < len(modules)
    )  # c_attn is q, k and v at once
    if make is llama:
        site = moments.site_of
        assert site["model.layers.0.self_attn.q_proj"] == site["model.layers.0.self_attn.v_proj"]
        assert (
            site["model.layers.0.mlp.gate_proj"]
            == site["model.layers.0.mlp.up_proj"]
            != site["model.layers.0.mlp.down_proj"]
        )


def test_the_decoders_start_token_is_part_of_what_general_text_uses() -> None:
    """Every pass of the decoder begins with it, drift's included: it must not lie in the null space."""
    model = t5()
    with torch.no_grad():
        model.shared.weight.copy_(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)))
    modules = {name: module for name, module in matching(model, PATTERN).items() if "decoder" in name}
    ids = torch.randint(3, 20, (160, 16), generator=torch.Generator().manual_seed(1))  # the start, 0, is not among them
    moments = null_space.second_moments(
        model, modules, iter([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    )
    first: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, x, y, name=name: first.__setitem__(name, x[0][:, 0].t()))
    with torch.no_grad():
        model(input_ids=ids[:1], decoder_input_ids=torch.zeros(1, 1, dtype=torch.long))
    for name in ("decoder.block.0.layer.0.SelfAttention.v", "decoder.block.1.layer.0.SelfAttention.v"):
        space, _ = null_space.low_energy(moments.sums[moments.site_of[name]] / moments.tokens, NullSpace(energy=0.01))
        assert float((space(first[name]).norm() / first[name].norm()) ** 2) < 0.01


@pytest.mark.parametrize(("energy", "complement"), [(0.02, False), (0.6, True)])
def test_energy_rule_is_the_largest_space_within_its_share(energy: float, complement: bool) -> None:
    values = torch.logspace(-4, 1, 30, dtype=torch.float64)
    if complement:
        values = torch.ones(30, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    space, found = null_space.low_energy(vectors @ torch.diag(values) @ vectors.t(), NullSpace(energy=energy))
    kept = space.dimensions
    assert values[:kept].sum() <= energy * values.sum() < values[: kept + 1].sum()
    assert space.basis.shape[1] == min(kept, 30 - kept)
    expected = vectors[:, :kept] @ vectors[:, :kept].t()
    if not complement:
        torch.testing.assert_close(space(torch.eye(30)), expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(space(space(torch.eye(30))), space(torch.eye(30)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, values, atol=1e-8, rtol=1e-6)


def test_absolute_rule_is_the_papers_threshold() -> None:
    values = torch.tensor([1e-3, 1e-2, 3e-2, 1.0, 2.0], dtype=torch.float64)
    space, _ = null_space.low_energy(torch.diag(values), NullSpace(rule="absolute", threshold=2e-2))
    assert space.dimensions == 2


def test_artefact_round_trip_and_refusal_of_another_backbone(tmp_path: Path, tokenizer) -> None:
    model = llama()
    settings = NullSpace(tokens=200, sequence_length=20)
    manifest = null_space.build(model, tokenizer, matching(model, PATTERN), TEXTS, settings, tmp_path / "p")
    spaces, loaded = null_space.load(tmp_path / "p", model, settings)
    assert loaded == manifest
    assert set(spaces) == set(matching(model, PATTERN))
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight += 1e-3
    with pytest.raises(GemstError, match=r"made for another backbone.*gemst null-space"):
        null_space.load(tmp_path / "p", other, settings)


def test_projectors_that_have_not_seen_the_decoders_start_token_are_refused(tmp_path: Path, tokenizer) -> None:
    model, settings = t5(), NullSpace(tokens=400, sequence_length=20)
    modules = {name: module for name, module in matching(model, PATTERN).items() if "decoder" not in name}
    null_space.build(model, tokenizer, modules, TEXTS, settings, tmp_path / "p")
    assert set(null_space.load(tmp_path / "p", model, settings)[0]) == set(modules)
    manifest = read_json(tmp_path / "p" / "manifest.json")
    assert manifest.pop("decoder_start") == 0
    write_json(tmp_path / "p" / "manifest.json", manifest)
    with pytest.raises(GemstError, match=r"decoder's start token.*gemst null-space"):
        null_space.load(tmp_path / "p", model, settings)


@pytest.mark.parametrize("make", [llama, t5, gpt2])
def test_item_tokens_leave_the_backbone_the_same_and_the_rest_does_not(make, tokenizer) -> None:
    model = make()
    before = null_space.fingerprint(model)
    rows = torch.randn(ITEMS, 32)
    add_item_tokens(model, tokenizer, [f"<item_{n}>" for n in range(ITEMS)], rows, rows)
    assert null_space.fingerprint(model) == before
    for name, parameter in model.named_parameters():
        if parameter.shape[0] < 20 + ITEMS or parameter.dim() == 1:
            with torch.no_grad():
                parameter += 1e-2
            assert null_space.fingerprint(model) != before, name
            return
    raise AssertionError("no parameter but the vocabulary")


def test_projectors_of_another_build_and_missing_ones_are_refused(tmp_path: Path, tokenizer) -> None:
    model = llama()
    for name, energy in (("a", 0.05), ("b", 0.3)):
        settings = NullSpace(tokens=200, sequence_length=20, energy=energy)
        null_space.build(model, tokenizer, matching(model, PATTERN), TEXTS, settings, tmp_path / name)
    (tmp_path / "b" / "projectors.safetensors").replace(tmp_path / "a" / "projectors.safetensors")
    with pytest.raises(GemstError, match=r"projectors.safetensors is not of its manifest.json"):
        null_space.load(tmp_path / "a", model, settings.model_copy(update={"energy": 0.05}))
    with pytest.raises(GemstError, match=r"projectors.safetensors does not exist.*gemst null-space"):
        null_space.load(tmp_path / "b", model, settings)


def test_fewer_tokens_than_directions_are_no_null_space(tmp_path: Path, tokenizer) -> None:
    model = llama()
    with pytest.raises(GemstError, match=r"gives 40 tokens, fewer than the 48 inputs of a Linear"):
        null_space.build(
            model, tokenizer, matching(model, PATTERN), TEXTS, NullSpace(tokens=40, sequence_length=20), tmp_path / "p"
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"energy": 0.0}, r"null_space\.energy leaves no Linear a null space.*Raise null_space\.energy"),
        ({"rule": "absolute", "threshold": 1e-12}, r"null_space\.threshold leaves no Linear a null space"),
    ],
)
def test_a_rule_that_keeps_no_direction_of_any_input_is_refused(tmp_path: Path, tokenizer, settings, said) -> None:
    model = llama()
    modules = matching(model, r"layers\.1\..*(q_proj|gate_proj)$")  # the first layer's inputs are twenty words alone
    texts = [" ".join(np.random.default_rng(0).choice(WORDS, 400))]
    made = NullSpace(tokens=400, sequence_length=20, **settings)
    with pytest.raises(GemstError, match=said):
        null_space.build(model, tokenizer, modules, texts, made, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_inputs_that_the_rule_leaves_nothing_are_named(tmp_path: Path, tokenizer) -> None:
    model = llama()
    _, moments = collect(model, tokenizer)
    least = {site: float(torch.linalg.eigvalsh(sums / 200)[0]) for site, sums in moments.sums.items()}
    between = sorted(least.values())[len(least) // 2]
    settings = NullSpace(tokens=200, sequence_length=20, rule="absolute", threshold=max(between, 1e-12) * 1.0001)
    manifest = null_space.build(model, tokenizer, matching(model, PATTERN), TEXTS, settings, tmp_path / "p")
    assert set(manifest["bare"]) == {site for site, value in least.items() if max(value, 0) >= settings.threshold}
    assert 0 < len(manifest["bare"]) < len(least)
    assert all(manifest["sites"][site]["dimensions"] == 1 for site in manifest["bare"])


def test_sequences_are_no_longer_than_a_backbone_has_positions(tmp_path: Path, tokenizer) -> None:
    model = gpt2()  # 256 learned positions, none after them
    texts = TEXTS * (1 + 600 // len(tokenizer(" ".join(TEXTS))["input_ids"]))
    manifest = null_space.build(
        model, tokenizer, matching(model, r"c_attn$"), texts, NullSpace(tokens=512, sequence_length=300), tmp_path / "p"
    )
    assert manifest["tokens"] == 512
    assert drift(model, model, tokenizer, texts, tokens=512)["tokens"] == 2 * 255


def test_fewer_tokens_than_a_sequence_are_one_shorter_sequence(tokenizer) -> None:
    (batch,) = null_space.batches(tokenizer, TEXTS, 15, 20)
    assert batch["input_ids"].shape == (1, 15)


def test_a_setting_that_the_rule_does_not_read_makes_no_difference(tmp_path: Path, tokenizer) -> None:
    model, settings = llama(), NullSpace(tokens=200, sequence_length=20)
    null_space.build(model, tokenizer, matching(model, PATTERN), TEXTS, settings, tmp_path / "p")
    null_space.load(tmp_path / "p", model, settings.model_copy(update={"threshold": 0.5}))


def test_an_empty_corpus_is_an_error(tokenizer) -> None:
    with pytest.raises(GemstError, match="holds no text"):
        next(null_space.batches(tokenizer, [], 100, 20))


def test_output_side_is_the_input_side_seen_through_the_weight(tokenizer) -> None:
    """E[y y^T] = W E[x x^T] W^T for a Linear without bias, and no two modules share an output."""
    model = llama()
    modules, inside = collect(model, tokenizer)
    outside = null_space.second_moments(model, modules, null_space.batches(tokenizer, TEXTS, 200, 20), "output")
    assert set(outside.sums) == set(modules)
    for name, module in modules.items():
        weight = module.weight.detach().double()
        expected = weight @ inside.sums[inside.site_of[name]] @ weight.t()
        torch.testing.assert_close(outside.sums[name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("field", "value"), [("side", "output"), ("energy", 0.3), ("tokens", 400)])
def test_an_artefact_of_other_settings_is_refused(tmp_path: Path, tokenizer, field: str, value: object) -> None:
    model = llama()
    settings = NullSpace(tokens=200, sequence_length=20)
    made = settings.model_copy(update={field: value, "corpus": Path("elsewhere.parquet")})
    null_space.build(model, tokenizer, matching(model, PATTERN), TEXTS, made, tmp_path / "p")
    said = rf"made with null_space\.{field} {value}, not {getattr(settings, field)}.*gemst null-space"
    with pytest.raises(GemstError, match=said):
        null_space.load(tmp_path / "p", model, settings)
    wanted = settings.model_copy(update={field: value})
    assert set(null_space.load(tmp_path / "p", model, wanted)[0]) == set(matching(model, PATTERN))


@pytest.mark.parametrize("width", [12, 36, 37])
def test_gram_is_the_upper_triangle_of_the_product(width: int) -> None:
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(null_space.gram(rows).triu(), (rows.t() @ rows).triu())


def test_inputs_are_let_go_and_one_that_takes_anothers_place_is_a_site_of_its_own() -> None:
    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"is_encoder_decoder": False})()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))
            self.alive: list[weakref.ref[torch.Tensor]] = []
            self.most = 0

        @property
        def base_model(self) -> torch.nn.Module:
            return self

        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            x = torch.nn.functional.one_hot(input_ids % 4, 4).float()
            for layer in self.layers:
                x = layer(x)
                self.alive.append(weakref.ref(x))
                self.most = max(self.most, sum(tensor() is not None for tensor in self.alive))
            return SimpleNamespace(last_hidden_state=x)

    model = Chain()
    stream = iter([{"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8)}])
    moments = null_space.second_moments(model, dict(model.layers.named_children()), stream)
    assert model.most == 1
    assert moments.site_of == {name: name for name in moments.sums}
    assert len(moments.sums) == 12
