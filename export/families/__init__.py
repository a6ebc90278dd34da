"""The families that bundles come from, and what tools that take any bundle ask of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyengine.bundle.bundle import Bundle

if TYPE_CHECKING:
    from torch import nn

    from ..graph import Inputs

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """What a family can do beside being exported.

    rebuild           a bundle's networks in torch again, from the bundle alone: component -> module and example inputs. None: a bundle
                      of this family does not say all that its modules need
    streams_in_torch  whether `pyengine.export.peers` has its stream in PyTorch
    """

    rebuild: Callable[[Bundle], dict[str, tuple[nn.Module, Inputs]]] | None = None
    streams_in_torch: bool = False


def _rebuild_shapes(bundle: Bundle) -> dict[str, tuple[nn.Module, Inputs]]:
    from .shapes.export import components
    from .shapes.modules import load_modules

    return components(load_modules(bundle))


FAMILIES = {
    "shapes": Family(_rebuild_shapes, streams_in_torch=True),
    "lvdm": Family(),
    "opensora": Family(),
    "streamingt2v": Family(),
    "wan": Family(),
    "artv": Family(),
}


def family_of(bundle: Bundle) -> Family:
    """The family that a manifest names; of one from elsewhere nothing is known but its bundle."""
    return FAMILIES.get(bundle.family, Family())
