"""The champion between two tunings: given today's catalogue and counts, measured on today's examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemst import inputs
from gemst.backbone import set_threads
from gemst.progress import Summary, stage

if TYPE_CHECKING:
    from gemst.config import Config


def append(config: Config) -> Summary:
    """Give the champion today's catalogue and counts without training.

    New items get IDs, items that are gone are retired, and a memory counts all of today's log.
    """
    import tempfile

    from gemst import registry
    from gemst.tuning.append import append as grow

    with stage("append") as summary, tempfile.TemporaryDirectory() as scratch:
        items = inputs.items()
        events = inputs.events()
        champion = registry.champion(config)
        summary.read["items"] = len(items)
        set_threads(config)
        grown = grow(champion.folder, items, events, config, Path(scratch) / "model")
        summary.written |= {"new": grown.new, "retired": grown.retired, "returned": grown.returned}
        if grown.recounted:
            summary.notes.append(f"the memory counts today's {len(events):,} events, under the weights it had")
        if grown:
            registered = registry.succeed(config, Path(scratch) / "model", champion)
            ids = registry.champion(config).folder / "item_ids"
            summary.written |= {"model": str(config.registry.model_name), "version": str(registered.version)}
            summary.notes.append(f"champion is version {registered.version}; to train on these IDs: extends {ids}")
        else:
            summary.notes.append("the champion has these items and counts already")
    return summary


def joint(config: Config, model: Path) -> float:
    """Joint NDCG@10 of another model on the present test examples, among the items that are still there.

    Its memory counts the present train examples: what it has may have seen the test ones (`append`).
    """
    from gemst import backbone, memory
    from gemst.evaluation.run import joint_score
    from gemst.ranking import rank

    train, valid, test = (inputs.examples(name) for name in ("train", "valid", "test"))
    set_threads(config)
    items = inputs.items()
    tuned = backbone.load_tuned(model, backbone.best_device()).only(items["item_id"])
    if config.ranking.memory and tuned.memory is not None:
        counted = memory.build(tuned.ids, memory.train_events(train))
        tuned = replace(tuned, memory=counted.fitted(tuned.memory.fits))
    return joint_score(
        config, train, valid, test, lambda examples, k, seen: rank(tuned, examples, k, config.ranking, seen)
    )
