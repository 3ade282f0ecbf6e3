"""RQ-VAE: an encoder, a residual quantizer and a decoder, learned together on item vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemst.backbone import best_device
from gemst.item_ids.embeddings import Floats
from gemst.item_ids.residual import nearest, revive

if TYPE_CHECKING:
    from torch import nn

_HIDDEN, _LATENT, _BATCH = 256, 64, 1024


def encoder(width: int) -> nn.Sequential:
    """The encoder of item vectors (n, width) into latents (n, _LATENT)."""
    from torch import nn

    return nn.Sequential(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _LATENT))


def fit(x: Floats, levels: int, size: int, epochs: int, seed: int) -> tuple[dict[str, Floats], list[Floats]]:
    """Learn from `x` (n, d); return the encoder's weights and the codebooks (levels of (size, latent)).

    Quantizer: vector-quantize-pytorch with k-means start, moving averages and revival of dead codes; codes still dead
    at the end are moved onto the latents worst served, so that none is wasted.
    """
    import torch
    from torch import nn
    from vector_quantize_pytorch import ResidualVQ

    from gemst.progress import Progress

    device = best_device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        encode = encoder(x.shape[1]).to(device)
        decode = nn.Sequential(nn.Linear(_LATENT, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, x.shape[1])).to(device)
        quantizer = ResidualVQ(
            dim=_LATENT, num_quantizers=levels, codebook_size=size, kmeans_init=True, kmeans_iters=20, decay=0.95,
            threshold_ema_dead_code=1, commitment_weight=0.25,
        ).to(device)  # fmt: skip
        optimizer = torch.optim.AdamW([*encode.parameters(), *decode.parameters()], lr=1e-3, weight_decay=1e-4)
        data = torch.from_numpy(x).to(device)
        with Progress("rq-vae", epochs) as progress:
            for _ in range(epochs):
                for part in torch.randperm(len(data)).split(max(_BATCH, 4 * size)):
                    batch = data[part.to(device)]
                    quantized, _, commitment = quantizer(encode(batch)[None])
                    # Unit vectors: d times the mean squared error is the squared distance, of order one.
                    loss = nn.functional.mse_loss(decode(quantized[0]), batch) * x.shape[1] + commitment.sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                progress.advance(f"loss {loss.item():.3f}")
    weights = {name: value.detach().cpu().numpy() for name, value in encode.state_dict().items()}
    residual = encoded(x, weights)
    codebooks = []
    for codebook in quantizer.codebooks.detach().cpu().numpy().astype(np.float32):
        codebooks.append(revive(residual, codebook))
        residual = residual - codebooks[-1][nearest(residual, codebooks[-1])]
    return weights, codebooks


def encoded(x: Floats, weights: dict[str, Floats]) -> Floats:
    """Latents (n, latent) of `x` under the encoder's weights."""
    import torch

    with torch.device("meta"):  # no start weights: they would draw random numbers
        encode = encoder(x.shape[1])
    encode.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, assign=True)
    with torch.inference_mode():
        latents: Floats = encode(torch.from_numpy(x)).numpy()
    return latents
