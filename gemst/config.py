"""params.yaml as one frozen, typed tree. This file is the only place where a default lives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the tree: immutable, and a misspelt key is an error rather than silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class Data(Section):
    """Where the logs are and how they become examples (docs/data.md)."""

    source: Literal["recbole", "hetrec", "amazon", "qilin", "table"] = Field(
        "recbole", description="format of the raw logs in `path`"
    )
    path: Path = Field(Path("data/ml-100k"), description="folder that holds the raw logs")
    columns: dict[str, str] = Field({}, description="own column name for each canonical one (source: table only)")
    max_history: Positive = Field(20, description="last events kept in a history")
    history: Literal["both", "own"] = Field("both", description="histories of both tasks, or of the target's own")
    split: Literal["leave-last-out", "global-time"] = Field(
        "leave-last-out", description="a user's last request of each task tests, or the newest share of all events"
    )
    valid_fraction: Fraction = Field(
        0.1, description="global-time split: share of events, by time, held for validation"
    )
    test_fraction: Fraction = Field(0.1, description="global-time split: share of events, by time, held for test")
    core: Natural = Field(0, description="k of the iterative k-core over users and items; 0 keeps everything")
    min_history: Natural = Field(1, description="a valid or test example needs at least this many history events")
    negatives: Literal["none", "uniform", "bm25", "shown"] = Field(
        "none", description="candidates sampled beside the target of each valid and test example"
    )
    num_negatives: Positive = Field(99, description="how many negatives per example")


class Backbone(Section):
    """The pretrained language model."""

    name: str = Field("data/smollm2-135m-instruct", description="a local folder or a hub name, e.g. google-t5/t5-base")
    num_layers: Positive | None = Field(
        None, description="keep the first layers only: for tests, and for comparisons that say so"
    )


class ItemIds(Section):
    """Item-ID tokenization (docs/item-ids.md)."""

    strategy: Literal["atomic", "rq-kmeans", "rq-vae", "joint"] = Field(
        "atomic", description="what an ID is made of: a token of the item's own, or codes (docs/item-ids.md)"
    )
    levels: Positive = Field(3, description="code levels of the semantic strategies")
    codebook_size: Positive = Field(64, description="codes per level of the semantic strategies")
    embedding: Literal["sentence", "backbone", "column"] = Field(
        "sentence", description="where item vectors come from: the sentence encoder, the backbone, or items.embedding"
    )
    encoder: str = Field("data/all-minilm-l6-v2", description="folder or hub name of the sentence encoder")
    joint: Literal["fused", "shared-specific"] = Field(
        "fused",
        description="strategy joint: every level from text and co-behaviour, or the last two from one of them each",
    )
    text_weight: Fraction = Field(
        0.5, description="strategy joint: weight of text against co-behaviour in an item's vector"
    )
    epochs: Positive = Field(200, description="strategy rq-vae: passes over the items")
    extends: Path | None = Field(
        None, description="folder of a published build: its IDs stay, new items are appended, missing ones are retired"
    )

    @model_validator(mode="after")
    def _shared_levels(self) -> ItemIds:
        if self.strategy == "joint" and self.joint == "shared-specific" and self.levels < 3:
            raise ValueError("item_ids.joint: shared-specific needs item_ids.levels of 3 or more (two are specific)")
        return self


class ItemRows(Section):
    """Where the rows of the item tokens stand before tuning."""

    behaviour: Fraction = Field(
        0.7, description="weight of co-behaviour against text in the input rows; items never met stay at their text"
    )
    norm: PositiveFloat = Field(
        2.0, description="length of the input rows in mean lengths of the vocabulary's: longer ones outweigh words"
    )
    tokens: Natural = Field(
        80_000,
        description="prompt tokens run through the untouched backbone to fit the output rows on its states; 0: no fit",
    )
    queries: Natural = Field(
        64,
        description="dimensions of the items' click rates by query among the features of that fit; 0 leaves them out",
    )
    scale: PositiveFloat = Field(
        0.1, description="scale of the output rows' text start: at 1 the first loss is far above ln(items)"
    )
    popularity: bool = Field(True, description="start the output rows at the log popularity of the training targets")


class NullSpace(Section):
    """The subspace that general text does not use (docs/tuning.md)."""

    corpus: Path = Field(
        Path("data/wikipedia/articles.parquet"), description="general text: a Parquet with `title`, `text`"
    )
    tokens: Positive = Field(40_000, description="general tokens the second moments are taken over")
    sequence_length: Positive = Field(512, description="tokens of a packed sequence of general text, at most")
    rule: Literal["energy", "absolute", "none"] = Field("energy", description="`none` switches the null space off")
    energy: Fraction = Field(
        0.05, description="rule energy: P spans the directions that hold at most this share of the trace"
    )
    side: Literal["input", "output"] = Field(
        "input",
        description="whose second moments: of every Linear's input, or of its output (tuning.fidelity: released)",
    )
    threshold: PositiveFloat = Field(
        2e-2, description="rule absolute: P spans the eigenvalues below this (the paper's)"
    )


class Gates(Section):
    """How the rec and src updates are mixed (docs/tuning.md)."""

    kind: Literal["heuristic", "learned", "fixed"] = Field(
        "heuristic", description="from losses, norms and counts; by hypergradient; or `rec` throughout (docs/tuning.md)"
    )
    rec: Fraction = Field(0.5, description="kind fixed, or the start of the others: the weight of rec; src has 1 - rec")
    lr: PositiveFloat = Field(0.05, description="kind learned: step size on the gate's logit")


class Tuning(Section):
    """How the backbone is tuned."""

    method: Literal["gems", "full", "lora", "galore", "pcgrad", "upgrad"] = Field(
        "gems", description="how the Linears are tuned (docs/tuning.md, Other ways to tune)"
    )
    tasks: Literal["both", "search", "recommendation"] = Field("both", description="one task gives a single-task model")
    alignment: Fraction = Field(
        0.0, description="rows that ask for an item by its title, per train example; they count as search"
    )
    fidelity: Literal["default", "paper", "released"] = Field(
        "default",
        description="method gems only: our engine, the paper's equations, or the released code's order of operations; "
        "the last two are for comparison, slow and large",
    )
    adapter: Literal["lora", "dora", "osf"] = Field("lora", description="kind of adapter; method: lora only")
    modules: str = Field(
        r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|SelfAttention\.[qkvo]|EncDecAttention\.[qkvo]"
        r"|DenseReluDense\.(wi|wi_0|wi_1|wo)|c_attn|c_proj|c_fc)$",
        description="pattern searched in module names; matches are tuned through subspaces",
    )
    rank: Positive = Field(64, description="rank of the shared subspace; rec and src take half of it each")
    subspaces: Literal["all", "shared", "specific"] = Field(
        "all", description="method gems: which of the subspaces there are; the others are an ablation"
    )
    refresh_every: Positive = Field(100, description="steps between refreshes of a layer's bases (T)")
    scale: PositiveFloat = Field(1.0, description="scale of the subspace update (GaLore's alpha)")
    gates: Gates = Gates()
    lr: PositiveFloat = Field(1e-3, description="peak learning rate of the subspace coefficients")
    item_lr: PositiveFloat = Field(1e-3, description="peak learning rate of the item-token rows")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled, as in AdamW; with method gems of the component inside the null space alone"
    )
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.99), description="Adam's, of every method")
    clip: PositiveFloat = Field(1.0, description="largest gradient norm")
    warmup: Fraction = Field(0.05, description="share of the steps with a rising learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the rates, after the warm-up")
    epochs: PositiveFloat = Field(1.0, description="passes over the train examples; may be a fraction")
    max_minutes: PositiveFloat | None = Field(
        None, description="stop the schedule so that tuning ends within this time; null trains all epochs"
    )
    max_tokens: Positive | None = Field(
        None, description="end the schedule with the last step inside this many tokens: one budget for every method"
    )
    layout: Literal["chain", "single"] = Field(
        "chain", description="chain: one row carries many targets of a user and task"
    )
    chain_items: Positive = Field(48, description="history items in one chain row")
    mixing: Literal["proportional", "equal"] = Field(
        "proportional",
        description="of the tasks in an epoch: all rows of both, or as many of each, the more frequent one's drawn "
        "anew every time",
    )
    batch_tokens: Positive = Field(2048, description="about so many tokens per batch, padding included")
    accumulate: Positive = Field(1, description="batches per optimizer step")
    precision: Literal["auto", "fp32", "bf16-autocast", "bf16-weights"] = Field(
        "auto",
        description="bf16-autocast: bf16 compute over fp32 weights; bf16-weights: over bf16 weights with the other "
        "half of their fp32 beside them (method gems); auto: bf16-autocast where that is the faster one, else fp32",
    )
    checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    distributed: Literal["ddp", "fsdp"] = Field(
        "ddp", description="with several processes: whole model in each, or its weights in shards (docs/distributed.md)"
    )
    loss: Literal["items", "vocabulary"] = Field(
        "items", description="softmax over the item tokens, or over everything"
    )
    validate_every: Positive = Field(200, description="steps between validations")
    validate_users: Positive = Field(
        200, description="users in a validation during tuning: at least so many, evenly spaced"
    )
    drift_limit: PositiveFloat | None = Field(
        None,
        description="KL from the backbone on general text, nats per token, that the backbone's learning rate heeds",
    )
    patience: Positive = Field(5, description="validations without a better NDCG@10 before tuning stops")
    checkpoint_every: Positive = Field(200, description="steps between checkpoints")

    @model_validator(mode="after")
    def _tasks_fit(self) -> Tuning:
        if self.precision == "bf16-weights" and self.method != "gems":
            raise ValueError(f"precision bf16-weights is for method gems; use bf16-autocast with {self.method}")
        if self.fidelity != "default" and (self.method != "gems" or self.gates.kind == "learned"):
            raise ValueError(f"fidelity {self.fidelity} is for method gems with a heuristic or fixed gate")
        if self.fidelity != "default" and (self.subspaces != "all" or self.precision == "bf16-weights"):
            raise ValueError(f"fidelity {self.fidelity} has all subspaces and fp32 weights")
        if self.tasks != "both" and self.method in ("pcgrad", "upgrad"):
            raise ValueError(f"method {self.method} weighs two tasks; use it with tasks: both")
        if self.tasks != "both" and self.gates.kind == "learned":
            raise ValueError(f"a learned gate compares two tasks; use gates.kind: heuristic with tasks: {self.tasks}")
        if self.tasks == "recommendation" and self.alignment:
            raise ValueError("alignment rows count as search; use alignment: 0 with tasks: recommendation")
        return self


class Prompts(Section):
    """How a history and a query become text."""

    style: Literal["compact", "paper"] = Field(
        "compact", description="compact spends fewer tokens; paper is the released text"
    )


class Ranking(Section):
    """Constrained decoding, and what it goes by beside the model."""

    memory: bool = Field(
        True,
        description="mix the log's counts (clicks under the query, co-visits, popularity) with the model's scores; "
        "tuning fits the weights on validation examples (docs/memory.md)",
    )
    beams: Positive = Field(20, description="beams of the constrained beam search (atomic IDs need none)")
    batch_size: Positive = Field(32, description="prompts ranked at once")


class Evaluation(Section):
    """What is measured."""

    ks: tuple[Annotated[int, Field(ge=1, le=65_535)], ...] = Field(
        (1, 5, 10, 20), description="cut-offs of every metric; 10 is always added"
    )
    exclude_seen: bool = Field(True, description="leave items of the user's train and valid events out of rankings")
    protocols: tuple[Literal["uniform99", "bm25-99", "shown"], ...] = Field(
        (),
        description="sampled protocols beside the full ranking: the targets among 99 other items, or among "
        "those the page showed (needs data.negatives: shown)",
    )
    drift_tokens: Positive = Field(20_000, description="held-out general tokens for perplexity and KL")
    bootstrap: Positive = Field(2000, description="resamples of the paired bootstrap")


class Registry(Section):
    """MLflow."""

    experiment: str = Field("gemst", description="the MLflow experiment of the runs")
    model_name: str | None = Field(
        "gemst", pattern=r"^[^/:'\"@?]+$", description="null logs the results without making a model version"
    )
    run_name: str | None = Field(None, description="null leaves the name to MLflow")
    parent: str | None = Field(None, description="id of the run this one is shown under, such as a study's")


class Config(Section):
    """The whole tree."""

    seed: int = Field(
        7, ge=0, le=2_000_000_000, description="of every random draw: equal seeds, equal results on one kind of machine"
    )
    threads: Positive | None = Field(None, description="compute threads; null takes all cores")
    data: Data = Data()
    backbone: Backbone = Backbone()
    prompts: Prompts = Prompts()
    item_ids: ItemIds = ItemIds()
    item_rows: ItemRows = ItemRows()
    null_space: NullSpace = NullSpace()
    tuning: Tuning = Tuning()
    ranking: Ranking = Ranking()
    evaluation: Evaluation = Evaluation()
    registry: Registry = Registry()

    @model_validator(mode="after")
    def _projects_the_side_it_measures(self) -> Config:
        side = "output" if self.tuning.fidelity == "released" else "input"
        if self.tuning.method == "gems" and self.null_space.rule != "none" and self.null_space.side != side:
            raise ValueError(f"tuning.fidelity {self.tuning.fidelity} needs null_space.side: {side}")
        return self

    @model_validator(mode="after")
    def _shows_what_was_shown(self) -> Config:
        if "shown" in self.evaluation.protocols and self.data.negatives != "shown":
            raise ValueError(f"evaluation.protocols: shown needs data.negatives: shown, not {self.data.negatives}")
        return self

    def flat(self) -> dict[str, Any]:
        """Return {"tuning.rank": 64, ...}, the form trackers want."""
        flat: dict[str, Any] = {}

        def walk(prefix: str, value: Any) -> None:
            if isinstance(value, dict) and value:
                for key, inner in value.items():
                    walk(f"{prefix}.{key}" if prefix else key, inner)
            else:
                flat[prefix] = value

        walk("", self.model_dump(mode="json"))
        return flat
