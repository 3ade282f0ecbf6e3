"""Item rows beside a frozen backbone: both families, tied heads, several ID levels, both losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemst.backbone import add_item_tokens, load, output_bias, output_head, output_scale, save
from gemst.config import Backbone, Config, Prompts
from gemst.errors import GemstError
from gemst.prompts import Prompter
from gemst.tuning.batches import make_batches
from gemst.tuning.methods import Facts, make
from gemst.tuning.model import ItemModel
from gemst.tuning.single import SingleBatches
from gemst.tuning.subspace import matching
from tests.ranking.tiny import PECULIAR
from tests.tuning.conftest import ITEMS, llama, t5

LEVELS = (4, 3)  # 12 items as 4 x 3 codes


def two_level_prompter(tokenizer) -> Prompter:
    rows = np.arange(ITEMS)
    ids = np.stack([20 + rows // 3, 20 + 4 + rows % 3], axis=1).astype(np.int64)
    return Prompter(tokenizer, ids, {f"i{n}": n for n in range(ITEMS)}, Prompts(), 20)


@pytest.mark.parametrize(("build", "encoder_decoder"), [(llama, False), (t5, True)])
def test_loss_is_the_log_probability_of_the_id_tokens_level_by_level(build, encoder_decoder, tokenizer, train) -> None:
    prompter = two_level_prompter(tokenizer)
    model = build(27)
    items = ItemModel(model, 20, LEVELS, False)
    batches = SingleBatches(train, prompter, batch_tokens=10_000, decoder_start=0 if encoder_decoder else None, seed=0)
    batch = batches.collate(np.argsort(batches.search, kind="stable"))
    with torch.no_grad():
        losses = items(batch).view(-1, 2)
    for at, row in enumerate(np.argsort(batches.search, kind="stable")):
        prompt, code = prompter.encode(batches.train[int(row)])[0], prompter.token_ids[batches.target[row]]
        with torch.no_grad():
            if encoder_decoder:
                inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, code[0]]])}
                logits = model(**inputs).logits[0]
            else:
                logits = model(torch.tensor([[*prompt, code[0]]])).logits[0, -2:]
        first = -logits[0, 20:24].log_softmax(-1)[code[0] - 20]
        second = -logits[1, 24:27].log_softmax(-1)[code[1] - 24]
        torch.testing.assert_close(losses[at], torch.stack([first, second]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("build", "encoder_decoder"), [(llama, False), (t5, True)])
def test_start_is_popularity_at_the_mean_state_and_text_beside_it(build, encoder_decoder, tokenizer, train) -> None:
    items = ItemModel(build(27), 20, LEVELS, False)
    prompter = two_level_prompter(tokenizer)
    batches = SingleBatches(train, prompter, batch_tokens=10_000, decoder_start=0 if encoder_decoder else None, seed=0)
    batch = batches.collate(np.argsort(batches.search, kind="stable"))
    before, counts = items.items_out.detach().clone(), torch.arange(7.0)
    with torch.no_grad():
        states = items.states(batch) * output_scale(items.model)
    items.start_popular(counts, states, batch.level)
    for level, part in enumerate((slice(0, 4), slice(4, 7))):
        mean = states[batch.level == level].mean(0)
        prior = torch.log1p(counts[part])
        torch.testing.assert_close(items.items_out[part] @ mean, prior - prior.mean(), atol=1e-4, rtol=1e-4)
        moved = items.items_out[part].detach() - before[part]
        torch.testing.assert_close(moved, (moved @ mean)[:, None] * mean / mean.dot(mean), atol=1e-4, rtol=1e-4)


def test_states_and_base_may_lie_on_another_device_than_the_model() -> None:
    """As where a GPU tunes what the CPU has made; `meta` refuses mixtures as a GPU does."""
    model = llama(27).to("meta")
    white = torch.eye(output_head(model).weight.shape[1])
    items = ItemModel(model, 20, LEVELS, False, white)
    items.start_popular(torch.arange(7.0), torch.randn(9, len(white)), torch.arange(9) % 2)
    assert {items.items_out.device.type, items.white.device.type, items.rows_out().device.type} == {"meta"}


@pytest.mark.parametrize("whole_vocabulary", [False, True])
def test_rows_learned_in_another_base_are_the_same_model(tokenizer, train, prompter, whole_vocabulary) -> None:
    batches = SingleBatches(train, prompter, batch_tokens=10_000, decoder_start=None, seed=0)
    batch = batches.collate(np.arange(len(train)))
    model = llama(20 + ITEMS)
    head = output_head(model).weight.detach().clone()
    half = torch.randn(head.shape[1], head.shape[1], generator=torch.Generator().manual_seed(0))
    white = half @ half.T / head.shape[1] + torch.eye(head.shape[1]) / 2
    plain, based = (ItemModel(model, 20, (ITEMS,), whole_vocabulary, base) for base in (None, white))
    torch.testing.assert_close(based(batch), plain(batch), atol=1e-4, rtol=1e-4)
    based.fold()
    torch.testing.assert_close(output_head(model).weight, head, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bloom", "lfm2"])
def test_a_family_that_cannot_place_tokens_tunes_on_single_rows_only(family, train, prompter) -> None:
    model = PECULIAR[family](20 + ITEMS)
    items = ItemModel(model, 20, (ITEMS,), False)
    chains = make_batches(Config.model_validate({"tuning": {"layout": "chain"}}), train, prompter, None)
    with pytest.raises(GemstError, match=r"ForCausalLM cannot place.*tuning.layout: single"):
        items(next(chains(0)))
    single = make_batches(Config.model_validate({"tuning": {"layout": "single"}}), train, prompter, None)
    assert items(next(single(0))).isfinite().all()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_shorter_than_a_packed_prompt_is_refused(family, train, prompter) -> None:
    """The chain's mask takes the window's place: equal to single rows as long as the window never bites."""
    torch.manual_seed(0)
    model = PECULIAR[family](20 + ITEMS).eval()
    items = ItemModel(model, 20, (ITEMS,), False)
    chains, single = (
        list(make_batches(Config.model_validate({"tuning": {"layout": layout}}), train, prompter, None)(0))
        for layout in ("chain", "single")
    )
    longest = max(int(batch.position_ids.max()) for batch in chains) + 1
    model.config.sliding_window = longest
    with torch.no_grad():
        packed, alone = (torch.cat([items(batch) for batch in some]).sort().values for some in (chains, single))
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)
    items.check_packed(longest)
    model.config.sliding_window = longest - 1
    with pytest.raises(GemstError, match=rf"prompts of {longest} tokens"):
        items.check_packed(longest)  # as tuning asks before its first step, of all epochs' longest
    with pytest.raises(GemstError, match=r"Set tuning.layout: single, or lower tuning.chain_items"):
        [items(batch) for batch in chains]
    with torch.no_grad():
        assert all(items(batch).isfinite().all() for batch in single)
        model.config.use_sliding_window = False  # named and switched off, as Qwen2's is
        torch.testing.assert_close(torch.cat([items(batch) for batch in chains]).sort().values, packed)


@pytest.mark.parametrize("whole_vocabulary", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "phi"])
def test_tuned_loss_is_that_of_the_exported_model(
    family, whole_vocabulary, tokenizer, train, prompter, tmp_path
) -> None:
    """A family that scales its embedding, and one whose head has a bias."""
    torch.manual_seed(0)
    model = PECULIAR[family](20).eval()
    rows_in, rows_out = torch.randn(2, ITEMS, 32) * 0.15
    first = add_item_tokens(model, tokenizer, [f"<item_{i}>" for i in range(ITEMS)], rows_in, rows_out)
    bias = output_bias(model)
    if bias is not None:
        torch.nn.init.normal_(bias)
    items = ItemModel(model, first, (ITEMS,), whole_vocabulary)
    with torch.no_grad():
        items.items_in += torch.randn(ITEMS, 32) * 0.15
        items.items_out += torch.randn(ITEMS, 32) * 0.15
    batches = SingleBatches(train, prompter, batch_tokens=10_000, decoder_start=None, seed=0)
    batch = batches.collate(np.arange(len(train)))
    with torch.no_grad():
        tuned = items(batch)
    items.fold()
    save(model, tokenizer, tmp_path / "model")
    plain, _ = load(Backbone(name=str(tmp_path / "model")))
    start = 0 if whole_vocabulary else first
    with torch.no_grad():
        logits = plain(batch.input_ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.at, start:]
    expected = torch.nn.functional.cross_entropy(logits, batch.labels - start, reduction="none")
    torch.testing.assert_close(tuned, expected, atol=1e-5, rtol=1e-5)


def test_vocabulary_loss_is_a_softmax_over_everything(tokenizer, train, prompter) -> None:
    model = llama(20 + ITEMS)
    batches = SingleBatches(train, prompter, batch_tokens=10_000, decoder_start=None, seed=0)
    batch = batches.collate(np.arange(len(train)))
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.at]
        expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        torch.testing.assert_close(ItemModel(model, 20, (ITEMS,), True)(batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("build", "encoder_decoder"), [(llama, False), (t5, True)])
def test_tuned_and_folded_model_survives_export(build, encoder_decoder, tokenizer, train, prompter, tmp_path) -> None:
    """Old rows keep their bits, new rows and Linears move, and the checkpoint on disk says what the model said."""
    model = build()
    old = model.get_input_embeddings().weight.detach().clone()
    tuned_names = set(matching(model, Config().tuning.modules))
    others = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.removesuffix(".weight") not in tuned_names and parameter.shape != old.shape
    }
    rows = torch.randn(ITEMS, 32, generator=torch.Generator().manual_seed(0))
    first = add_item_tokens(model, tokenizer, [f"<item_{i}>" for i in range(ITEMS)], rows, rows * 0.1)
    assert first == 20
    config = Config.model_validate({"null_space": {"rule": "none"}, "tuning": {"rank": 8, "lr": 1e-2, "item_lr": 1e-2}})
    items = ItemModel(model, first, (ITEMS,), False)
    method = make(config, items, tmp_path)
    batches = SingleBatches(train, prompter, batch_tokens=10_000, decoder_start=0 if encoder_decoder else None, seed=0)
    batch = batches.collate(np.argsort(batches.search, kind="stable"))
    losses = []
    for _ in range(12):
        for _ in range(1 + method.needs_start):
            starting = method.needs_start
            method.enter(batch)
            method.prepare(batch.targets, observe=False)
            each = items(batch)
            method.backward(each / len(each), batch)
            if starting:
                method.start()
        method.step(Facts(batch.targets, (1.0, 1.0)))
        losses.append(float(each.mean().detach()))
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        tuned = items(batch)
    method.finish()
    items.fold()
    save(model, tokenizer, tmp_path / "model")
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    family = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    plain = family.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ItemModel(plain, first, (ITEMS,), False)(batch), tuned, atol=1e-5, rtol=1e-5)
    exported = dict(plain.named_parameters())
    assert len(others) > 2
    assert all(torch.equal(exported[name], value) for name, value in others.items())
    assert torch.equal(plain.get_input_embeddings().weight[:20], old)
    assert torch.equal(plain.get_output_embeddings().weight[:20], old)
