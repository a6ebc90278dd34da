"""A new process up to its first frame: `python benchmarks/gpu/first_frame.py BACKEND PRECISION CACHE`. See stream.py."""

from __future__ import annotations

import json
import sys
import time


def main(backend: str, precision: str, cache: str) -> None:
    start = time.perf_counter()
    if backend == "torch":
        import torch_segments

        torch_segments.register()
    import pyengine

    imported = time.perf_counter() - start
    options = {
        "backend": backend,
        "device": "cuda",
        "precision": precision,
        "choice": "cut",
        "cache_dir": cache,
    }
    engine = pyengine.load("shapes", **options)  # type: ignore[arg-type]
    with engine.stream("a red circle bounces over a blue background", seed=7) as stream:
        next(stream)
        print(json.dumps({"at": time.time(), "import": imported}))


if __name__ == "__main__":
    main(*sys.argv[1:])
