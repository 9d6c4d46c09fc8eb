"""Compile the variants of the Triton kernels ahead of time; no GPU is needed.

    python tools/compile_kernels.py           a table: registers, spills and shared memory
    python tools/compile_kernels.py --json    the same as one JSON list

Exits with an error if a variant does not compile.
"""

import contextlib
import inspect
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# read when a kernel is decorated: an interpreted one cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lmlosses.logprobs import triton as kernels  # noqa: E402

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
# shared memory of a block, in bytes, at most (CUDA C++ Programming Guide, compute capabilities)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_SHARED = {
    "targets": "*i64", "first": "i32", "width": "i32", "tile_stride": "i64",
    "target_stride": "i64", "field_stride": "i64", "token_stride": "i64",
    "softcap": "fp64", "temperature": "fp64",
}  # fmt: skip
# each kernel's arguments; "tile" stands for the tile's dtype
SIGNATURES = {
    kernels._merge: _SHARED | dict.fromkeys(("tile", "state", "class_weight"), "*tile"),
    kernels._differentiate: _SHARED
    | dict.fromkeys(("tile", "state", "coefficients", "class_weight"), "*tile")
    | dict.fromkeys(("factor_stride", "factor_token_stride"), "i64"),
}
_FLAGS = ("weighted", "MEAN", "ENTROPY", "CAPPED", "TEMPERED", "odd rows")
_PLAIN = dict.fromkeys(_FLAGS, False)
_ALL = dict.fromkeys(_FLAGS, True) | {"odd rows": False}
# dtype and columns of the tile, and what is asked for
_VARIANTS = {
    "plain": ("fp32", 50_000, _PLAIN),
    "mean, weighted": ("fp32", 50_000, _PLAIN | {"MEAN": True, "weighted": True}),
    "all": ("fp32", 50_000, _ALL),
    "all, odd rows": ("fp32", 50_000, _ALL | {"odd rows": True}),
    "all, one warp": ("fp32", 100, _ALL),
    "all, not kept": ("fp32", 50_000, _ALL | {"KEEP": False}),
    "all, double": ("fp64", 50_000, _ALL),
}


def compiled(kernel: Any, variant: str, arch: int) -> dict[str, Any]:
    """What one variant takes of a multiprocessor."""
    dtype, width, asked = _VARIANTS[variant]
    columns, warps = kernels._block(width, {"fp32": 4, "fp64": 8}[dtype])
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {"COLUMNS": columns, "KEEP": True} | asked
    if not constants.pop("weighted"):
        constants["class_weight"] = None
    constants = {name: constants[name] for name in names if name in constants}
    types = SIGNATURES[kernel]
    signature = {
        name: "constexpr" if name in constants else types[name].replace("tile", dtype)
        for name in names
    }
    # as at a launch: memory starts at a multiple of 16 bytes, and so does each row, or not
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name == "tile_stride" and not asked["odd rows"])
    }
    # registers stand in the log of NVIDIA's assembler alone, which Triton prints if asked
    with knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(io.StringIO()) as log:
            built = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": warps},
            )
    found = {
        key: int(re.search(pattern, log.getvalue())[1])
        for key, pattern in {
            "registers": r"Used (\d+) registers",
            "stores": r"(\d+) bytes spill stores",
            "loads": r"(\d+) bytes spill loads",
        }.items()
    }
    return {
        "kernel": kernel.fn.__name__.strip("_"), "variant": variant, "arch": arch, **found,
        "shared": built.metadata.shared, "limit": SHARED_LIMIT[arch],
        "cubin": len(built.asm["cubin"]),
    }  # fmt: skip


def main() -> None:
    rows = [
        compiled(kernel, variant, arch)
        for kernel, variant, arch in itertools.product(SIGNATURES, _VARIANTS, ARCHITECTURES)
        if "KEEP" in kernel.arg_names or "not kept" not in variant
    ]
    print(json.dumps(rows) if "--json" in sys.argv[1:] else table(rows))


def table(rows: list[dict]) -> str:
    """One line for each kernel and variant, with a column for each architecture."""
    lines = ["registers / bytes spilled / bytes of shared memory"]
    lines.append(f"{'':30}" + "".join(f"{f'sm_{arch}':>16}" for arch in ARCHITECTURES))
    by_name: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row['kernel']:14}{row['variant']}"
        by_name.setdefault(name, []).append(
            f"{row['registers']} / {row['stores'] + row['loads']} / {row['shared']}"
        )
    lines += [f"{name:30}" + "".join(f"{v:>16}" for v in found) for name, found in by_name.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
