"""Parameters of components that are computed from those of the checkpoint: tables of time embeddings, and fused merger matrices.

    derived = derivations(networks)                 # name -> function of a reader of tensors by name
    fill(networks)                                  # from the networks' own parameters

Names are those below one module that holds the networks and the components, so the same functions serve modules in memory and weights that
stay on disk. Products are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .components import Denoiser, TextDenoiser
from .layers import timestep_embedding
from .merger import Merger
from .trunk import Trunk

Read = Callable[[str], Tensor]
Derivation = Callable[[Read], Tensor]


def derivations(root: nn.Module) -> dict[str, Derivation]:
    """By name below `root`: every parameter that no checkpoint has."""
    names = {id(module): name for name, module in root.named_modules()}
    found: dict[str, Derivation] = {}
    for name, module in root.named_modules():
        if isinstance(module, Denoiser):
            found[f"{name}.table.rows"] = partial(
                time_table, module.base, names[id(module.base)], range(module.table.timesteps)
            )
            found[f"{name}.cam_table.rows"] = partial(
                time_table,
                module.extractor,
                names[id(module.extractor)],
                range(module.cam_table.timesteps),
            )
            for index, merger in enumerate(module.base.mergers()):
                for part, function in _FUSED.items():
                    found[f"{name}.mergers.{index}.{part}"] = partial(function, _base(merger, names))
        if isinstance(module, TextDenoiser):
            found[f"{name}.table.rows"] = partial(
                time_table, module.unet, names[id(module.unet)], range(module.table.timesteps)
            )
    return found


def fill(root: nn.Module) -> None:
    """Computes every derived parameter from the parameters that `root` has, in place."""
    with torch.no_grad():
        for name, derive in derivations(root).items():
            root.get_parameter(name).copy_(derive(root.get_parameter))


def time_table(trunk: Trunk, prefix: str, timesteps: Sequence[float], read: Read) -> Tensor:
    """What every residual block adds at each of `timesteps`, side by side. [timesteps, sum of widths]"""
    names = {id(module): name for name, module in trunk.named_modules()}

    def layer(module: nn.Module, x: Tensor) -> Tensor:
        where = f"{prefix}.{names[id(module)]}"
        return F.linear(x, read(f"{where}.weight").to(x), read(f"{where}.bias").to(x))

    first, second = trunk.time_layers()
    dtype = read(f"{prefix}.{names[id(first)]}.weight").dtype
    x = timestep_embedding(torch.tensor(timesteps), trunk.channels)
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = F.silu(layer(second, F.silu(layer(first, x))))
    return torch.cat([layer(block.parts().embedding, x) for block in trunk.residuals()], -1)


def _base(merger: Merger, names: dict[int, str]) -> str:
    return names[id(merger.temporal_transformer)]


def _query_weight(base: str, read: Read) -> Tensor:
    """W_q P_in, its columns scaled by the norm's weight."""
    to_q, proj_in = read(f"{base}.attention.to_q.weight"), read(f"{base}.proj_in.weight")
    return (to_q.double() @ proj_in.double()) * read(f"{base}.norm.weight").double()


def _query_bias(base: str, read: Read) -> Tensor:
    inner = read(f"{base}.proj_in.weight").double() @ read(f"{base}.norm.bias").double()
    return read(f"{base}.attention.to_q.weight").double() @ (inner + read(f"{base}.proj_in.bias").double())


def _out_weight(base: str, read: Read) -> Tensor:
    return read(f"{base}.proj_out.weight").double() @ read(f"{base}.attention.to_out.0.weight").double()


def _out_bias(base: str, read: Read) -> Tensor:
    inner = read(f"{base}.attention.to_out.0.bias").double()
    return read(f"{base}.proj_out.weight").double() @ inner + read(f"{base}.proj_out.bias").double()


_FUSED: dict[str, Callable[[str, Read], Tensor]] = {
    "query.weight": _query_weight,
    "query.bias": _query_bias,
    "out.weight": _out_weight,
    "out.bias": _out_bias,
}
