"""A component at one set of sizes: what a plan holds engines for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Variant"]


@dataclass(frozen=True)
class Variant:
    """A component with sizes: `Variant.of("denoiser", frames=8, ring=8)`."""

    component: str
    sizes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, component: str, **sizes: int) -> Variant:
        return cls(component, tuple(sorted(sizes.items())))

    def sized(self, **sizes: int) -> Variant:
        """The same with further or other sizes."""
        return Variant.of(self.component, **{**self.symbols, **sizes})

    @property
    def symbols(self) -> dict[str, int]:
        return dict(self.sizes)

    def __str__(self) -> str:
        return ".".join((self.component, *(f"{name}{size}" for name, size in self.sizes)))
