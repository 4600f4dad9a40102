"""Write a checkpoint of random weights with the published names, shapes, files and index, at any size.

    python -m tools.make_synthetic out/int4 --like qvl_runtime/nano                          # 9.73 GB in five files
    python -m tools.make_synthetic out/bf16 --like qvl_runtime/nano --kind qwen-vl-chat      # 19.3 GB
    python -m tools.make_synthetic out/small --like qvl_runtime/nano --divide 8 --layers 2 --vision-layers 2

The tokenizer and the ids of images are those of the checkpoint `--like`. Its answers are noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qvl_runtime.errors import QVLError
from qvl_runtime.weights.synthetic import SYNTHETIC
from qvl_runtime.weights.synthetic_files import write_synthetic


def main(arguments: list[str] | None = None) -> int:
    """Write the checkpoint; returns the exit status, 2 for an error of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the new folder")
    parser.add_argument("--like", type=Path, required=True, help="a checkpoint folder whose tokenizer it is to have")
    parser.add_argument("--kind", choices=SYNTHETIC, default="qwen-vl-chat-int4")
    parser.add_argument("--layers", type=int, help="decoder blocks (default: 32)")
    parser.add_argument("--vision-layers", type=int, help="blocks of the vision encoder (default: 48)")
    parser.add_argument("--file-bytes", type=int, default=2 * 10**9, help="maximum bytes of a file (default: 2 GB)")
    parser.add_argument("--divide", type=int, default=1, help="divide all widths by 2, 4, 8 or 16")
    args = parser.parse_args(arguments)
    try:
        files = write_synthetic(
            args.folder, args.like, args.kind, args.layers, args.vision_layers, args.file_bytes, args.divide
        )
    except QVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {sum(files.values()):,} bytes in {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
