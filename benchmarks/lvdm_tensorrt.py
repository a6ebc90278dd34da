"""TensorRT for RTX engines of a released UNet at full size, built without its GPU: `python benchmarks/lvdm_tensorrt.py BUNDLE...`

BUNDLE is a folder that `python -m pyengine.export.families.lvdm.full_size --keep` made. Every segment of the UNet
between our ops is compiled for the target in bf16; seconds, peak memory and size of the engines go to
results/lvdm_tensorrt.json. Nothing runs: that takes the GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from pyengine.build.builder import build
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant

RESULTS = Path(__file__).parent / "results" / "lvdm_tensorrt.json"
ROWS = 2  # with guidance


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for path in arguments.bundles:
        bundle, variant = Bundle.load(path), Variant.of("prediction", branches=ROWS, streams=1)
        with tempfile.TemporaryDirectory(dir=path.parent) as cache:
            start = time.perf_counter()
            plan = build(
                bundle,
                variants=[variant],
                backend="tensorrt",
                target=arguments.target,
                choice="cut",
                cache_dir=Path(cache),
            )
            part = plan.part(variant)
            sizes = [(part.folder / str(name)).stat().st_size for name in part.engines]
            result = {
                "target": arguments.target,
                "precision": plan.precision,
                "rows": ROWS,
                "segments": len(sizes),
                "engines_gb": round(sum(sizes) / 1e9, 3),
                "seconds": round(time.perf_counter() - start, 1),
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            }
        print(bundle.name, result, flush=True)
        known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        arguments.output.write_text(json.dumps(known | {bundle.name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
