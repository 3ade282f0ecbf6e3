"""What general text does not use: second moments of every Linear's input, and the projector onto their low end.

A Linear's output on general text moves by dW x, so the side that counts is the INPUT side: P projects onto the
low-energy eigenspace of C = E[x x^T] and every update basis is taken inside range(P).
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from gemst.backbone import context_length, decoder_start, hidden, output_head, vocabulary
from gemst.config import NullSpace
from gemst.errors import GemstError
from gemst.files import atomic_folder, read_json, require
from gemst.progress import track
from gemst.tuning.precision import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Range:
    """P = B B^T, or I - B B^T when `complement`; B (n, k) is whichever side is thinner."""

    basis: Tensor
    complement: bool

    @property
    def dimensions(self) -> int:
        """rank P."""
        width, kept = self.basis.shape
        return width - kept if self.complement else kept

    def __call__(self, vectors: Tensor) -> Tensor:
        """P @ vectors, (n, k) -> (n, k)."""
        basis = self.basis.to(vectors)
        inside = basis @ (basis.t() @ vectors)
        return vectors - inside if self.complement else inside


def second_moments(
    model: nn.Module,
    modules: dict[str, nn.Module],
    batches: Iterator[dict[str, Tensor]],
    side: str = "input",
    precision: str = "fp32",
) -> Moments:
    """One streaming pass: C of every site, float64; modules that read the same tensor share one input site.

    `batches` hold input_ids and attention_mask (rows, positions), without padding. An encoder-decoder reads each row on
    both sides, the decoder behind its start token, as it does whenever it is used.
    The model runs in `precision` (tuning.precision), so its moments are of what tuning feeds the layers; products and
    sums never do: bf16 rounding of the inputs alone adds about 1e-6 of a site's trace, far below what rules keep.
    """
    gathered = Moments({}, {}, 0)
    seen: dict[int, tuple[str, weakref.ref[Tensor]]] = {}

    def hook(name: str) -> Any:
        def run(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0] if side == "input" else output
            site, tensor = seen.get(id(x), (name, None))
            if tensor is None or tensor() is not x:  # an id is used again once its tensor is gone
                site, seen[id(x)] = name, (name, weakref.ref(x))
            gathered.site_of.setdefault(name, site)
            if site == name:
                with torch.autocast(x.device.type, enabled=False):
                    moment = gram(x.detach().flatten(0, -2).float())
                total = gathered.sums.get(site)
                gathered.sums[site] = moment.double() if total is None else total.add_(moment)

        return run

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with torch.inference_mode():
            place = next(model.parameters()).device
            for batch in batches:
                batch = {name: tensor.to(place) for name, tensor in batch.items()}
                ids = batch["input_ids"]
                gathered.tokens += ids.numel()
                seen.clear()
                if (start := decoder_start(model)) is not None:  # type: ignore[arg-type]
                    batch["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
                with autocast(precision, place):
                    hidden(model, **batch, use_cache=False)  # type: ignore[arg-type]
            for total in gathered.sums.values():
                mirror(total)
    finally:
        for handle in handles:
            handle.remove()
    return gathered


def mirror(product: Tensor, size: int = 128) -> None:
    """Write the upper triangle of a square matrix over its lower one, in place."""
    for start in range(0, len(product), size):
        stop = start + size
        corner = product[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).t())
        product[stop:, start:stop] = product[start:stop, stop:].t()


def gram(rows: Tensor, blocks: int = 6) -> Tensor:
    """X^T X (n, n) of `rows` (k, n), its upper triangle alone (what lies below is not meaningful): 58 % of the work."""
    width = rows.shape[1]
    if width % blocks:
        return rows.t() @ rows
    size = width // blocks
    product = rows.new_empty(width, width)
    for start in range(0, width, size):
        torch.mm(rows[:, start : start + size].t(), rows[:, start:], out=product[start : start + size, start:])
    return product


@dataclass
class Moments:
    """Sums of x x^T by site (n, n) float64, the site each module reads, and the tokens they were taken over."""

    sums: dict[str, Tensor]
    site_of: dict[str, str]
    tokens: int


def below(values: Tensor, settings: NullSpace) -> int:
    """How many of the eigenvalues `values` (n,), ascending, the rule keeps: perhaps none, perhaps all.

    rule energy: the most directions that together hold at most `energy` of the trace; absolute: eigenvalues below
    `threshold` (the paper's rule).
    """
    if settings.rule == "energy":
        return int((values.cumsum(0) <= settings.energy * values.sum()).sum())
    return int((values < settings.threshold).sum())


def low_energy(moment: Tensor, settings: NullSpace) -> tuple[Range, Tensor]:
    """P of one site and the eigenvalues of C / tokens, ascending. `moment` (n, n) is C, normalised.

    Always leaves at least one direction on either side.
    """
    found = np.linalg.eigh(moment.cpu().numpy())  # LAPACK, without the GIL
    values, vectors = (torch.from_numpy(part) for part in found)
    values = values.clamp(min=0)
    width = moment.shape[0]
    kept = min(max(below(values, settings), 1), width - 1)
    if kept <= width // 2:
        return Range(vectors[:, :kept].float().contiguous(), complement=False), values
    return Range(vectors[:, kept:].float().contiguous(), complement=True), values


def batches(tokenizer: Any, texts: list[str], tokens: int, length: int, rows: int = 4) -> Iterator[dict[str, Tensor]]:
    """General text as packed sequences of `length` tokens, up to `tokens` in all. Raises GemstError if it is empty."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(stream) >= tokens:
            break
    length = min(length, tokens, len(stream))
    count = min(tokens, len(stream)) // length if length else 0
    if count == 0:
        raise GemstError(
            "the general corpus holds no text", "Point null_space.corpus at a Parquet with a `text` column"
        )
    blocks = torch.tensor(stream[: count * length]).view(count, length)
    for start in range(0, count, rows):
        block = blocks[start : start + rows]
        yield {"input_ids": block, "attention_mask": torch.ones_like(block)}


def build(
    model: PreTrainedModel,
    tokenizer: Any,
    modules: dict[str, nn.Module],
    texts: list[str],
    settings: NullSpace,
    out: Path,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Collect moments with the model run in `precision`, choose P per site, write `out`; returns the manifest.

    Raises GemstError when there are fewer tokens than the widest site has directions: most of them would look unused;
    and when the rule keeps no direction of any site. Where it keeps none of some, `bare` in the manifest names them:
    their one direction is against the rule.
    """
    length = min(settings.sequence_length, context_length(model) or settings.sequence_length)
    count = max(settings.tokens // (4 * length), 1)
    stream = track(batches(tokenizer, texts, settings.tokens, length), "second moments", total=count)
    moments = second_moments(model, modules, stream, settings.side, precision)
    widest = max(len(total) for total in moments.sums.values())
    if moments.tokens < widest:
        raise GemstError(
            f"the general corpus gives {moments.tokens:,} tokens, fewer than the {widest:,} inputs of a Linear",
            "Point null_space.corpus at more text, or raise null_space.tokens",
        )
    tensors, sites, bare = {}, {}, []
    for site, (space, values) in track(_decompose(moments, settings), "eigendecompositions", total=len(moments.sums)):
        total = moments.sums[site]
        tensors[f"{site}.basis"], tensors[f"{site}.eigenvalues"] = space.basis, values.float()
        sites[site] = {"complement": space.complement, "dimensions": space.dimensions, "width": total.shape[0]}
        bare += [site] if below(values, settings) == 0 else []
    if len(bare) == len(sites):
        setting = f"null_space.{settings.rule if settings.rule == 'energy' else 'threshold'}"
        raise GemstError(f"{setting} leaves no Linear a null space", f"Raise {setting}")
    manifest = {
        "backbone": fingerprint(model),
        "corpus": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        "settings": settings.model_dump(mode="json"),
        "tokens": moments.tokens,
        "decoder_start": decoder_start(model),
        "site_of": moments.site_of,
        "sites": sites,
        "bare": bare,
    }
    manifest["hash"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    from safetensors.torch import save_file

    with atomic_folder(out) as folder:
        save_file(tensors, folder / "projectors.safetensors", metadata={"hash": str(manifest["hash"])})
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def _decompose(moments: Moments, settings: NullSpace) -> Iterator[tuple[str, tuple[Range, Tensor]]]:
    """P and eigenvalues site by site, as many at a time as there are threads: each one alone uses them badly."""
    threads = torch.get_num_threads()
    sites = list(moments.sums)
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1, user_api="blas"):
        found = pool.map(lambda site: low_energy(moments.sums[site] / moments.tokens, settings), sites)
        yield from zip(sites, found, strict=True)


def load(folder: Path, model: PreTrainedModel, settings: NullSpace) -> tuple[dict[str, Range], dict[str, Any]]:
    """P by module name, and the manifest.

    Raises GemstError when it belongs to another model, was made with other settings (the corpus may lie elsewhere), or
    its files differ.
    """
    from safetensors import safe_open

    manifest = read_json(require(folder / "manifest.json", made_by="gemst null-space"))
    if manifest["backbone"] != fingerprint(model):
        raise GemstError(f"{folder} was made for another backbone", "Run `gemst null-space` with the present backbone")
    if manifest.get("decoder_start") != decoder_start(model):
        raise GemstError(f"{folder} has not seen the decoder's start token", "Run `gemst null-space` again")
    unread = "threshold" if settings.rule == "energy" else "energy"
    for name, value in settings.model_dump(mode="json", exclude={"corpus", unread}).items():
        if (made := manifest["settings"].get(name)) != value:
            raise GemstError(f"{folder} was made with null_space.{name} {made}, not {value}", "Run `gemst null-space`")
    with safe_open(require(folder / "projectors.safetensors", made_by="gemst null-space"), "pt") as file:
        if file.metadata()["hash"] != manifest["hash"]:
            raise GemstError(f"{folder}: projectors.safetensors is not of its manifest.json", "Run `gemst null-space`")
        spaces = {
            site: Range(file.get_tensor(f"{site}.basis").to(vocabulary(model).device), facts["complement"])
            for site, facts in manifest["sites"].items()
        }
    return {name: spaces[site] for name, site in manifest["site_of"].items()}, manifest


def fingerprint(model: PreTrainedModel) -> str:
    """Short hash of a model's parameter names, shapes and a sample of each one's values."""
    digest = hashlib.sha256()
    grow = {id(vocabulary(model)), id(output_head(model).weight), id(output_head(model).bias)}  # by item tokens
    for name, parameter in model.named_parameters():
        if id(parameter) in grow:
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().contiguous().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
