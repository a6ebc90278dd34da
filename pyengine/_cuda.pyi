"""Types of the compiled module for NVIDIA devices. Every op is a function; SIGNATURES, its docstring and export/ops/ say
what it takes. The module exists only where the package was built with CUDA.

Arrays are on the device, C-contiguous, and stay the caller's. Ops are queued on `stream` and read indices, levels,
slots and addresses of rings when they run, so that they may be captured in a CUDA graph: values are not checked (a slot
out of range is taken as -1). A `float8_e4m3` ring holds value / scale of its head, with scales float32 [heads].
"""

from typing import Any, Literal, Protocol

class Array(Protocol):
    @property
    def pointer(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

class Rings(Protocol):
    """One ring per stream: their addresses, int64 [streams], and the shape and dtype of each."""

    @property
    def bases(self) -> Array: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

class Op(Protocol):
    def __call__(
        self, *inputs: Array | Rings | None, stream: int = 0, **others: Array | Rings | float | str | None
    ) -> Any: ...

SIGNATURES: dict[str, dict[Literal["inputs", "arrays", "attributes"], tuple[str, ...]]]

def __getattr__(name: str) -> Op: ...
def device_count() -> int: ...
def check_device() -> None: ...
def has_warpgroups() -> bool: ...
def use_warpgroups(wanted: bool) -> bool: ...
def attention_launch(
    *,
    scope: str,
    dtype: str,
    batch: int,
    frames: int,
    tokens: int,
    heads: int,
    head_dim: int,
    ring: int,
    processors: int,
    block_bytes: int,
    processor_bytes: int,
    warpgroups: bool = False,
    may_split: bool = False,
) -> dict[str, Any]: ...
