"""What a small but real run leaves behind: a tiny Llama with item tokens, its identifiers, its results."""

import shutil
from pathlib import Path

import polars as pl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gemst import backbone, item_ids, layout
from gemst.config import Config
from gemst.files import write_json
from gemst.provenance import of_examples, of_model

ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "title": ["Alien", "Brazil", "Casablanca", "Dune"],
        "text": [None, None, None, None],
        "categories": [["horror"], ["comedy"], ["romance"], ["drama"]],
    },
    schema_overrides={"text": pl.String},
)


def make_model(folder: Path, ids: Path, seed: int = 0) -> None:
    """What `gemst tune` leaves behind."""
    import torch

    torch.manual_seed(seed)
    words = ["<pad>", "<unk>", *["History", "Next", "Find", "comedy", ":", "Alien"]]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    tokens = item_ids.load(ids).tokens
    rows = torch.randn(len(tokens), 16)
    first = backbone.add_item_tokens(model, tokenizer, tokens, rows, rows)
    backbone.save(model, tokenizer, folder)
    params = Config().model_dump(mode="json")
    card = {"first_item_token": first, "prompts": params["prompts"], "max_history": 20, "params": params}
    write_json(folder / "gemst.json", card)
    shutil.copytree(ids, folder / "item_ids")


def write_results(joint: float, examples: str = "these", seconds: float = 1.0) -> None:
    """What `gemst evaluate` leaves behind, and the test examples it has read: other `examples`, other ones."""
    layout.EXAMPLES.mkdir(exist_ok=True)
    pl.DataFrame({"targets": [[examples]]}).write_parquet(layout.EXAMPLES / "test.parquet")
    write_json(
        layout.EVALUATION / "metrics.json",
        {
            "model": {"search": {"ndcg@10": 0.25, "hit@1": 0.1}, "joint": joint},
            "references": {"bm25": {"search": {"ndcg@10": 0.125}}},
            "counts": {"search": 3},
            "seconds": {"model": seconds},
            "of": {"model": of_model(), "examples": of_examples(Config())},
        },
    )
    pl.DataFrame({"row": [0], "ndcg@10": [0.25]}).write_parquet(layout.EVALUATION / "per_query.parquet")
    (layout.EVALUATION / "report.html").write_text("<html></html>")
