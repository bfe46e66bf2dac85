"""Makes a checkpoint of true names, shapes and shards that takes no disk: its weights are holes in sparse files, all 0.

python -m moecompiler.tools.sparse_checkpoint --model 8x22b build/sparse-8x22b
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moecompiler.config import load_config
from moecompiler.errors import UserError
from moecompiler.pages.figures import byte_size
from moecompiler.sparse_checkpoint import write_sparse_checkpoint
from moecompiler.tools.main import complain


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="8x7b, 8x22b or a config.json.")
    parser.add_argument("directory", type=Path, help="Where it goes: an empty or new folder.")
    options = parser.parse_args(arguments)
    try:
        total = write_sparse_checkpoint(load_config(options.model), options.directory)
    except UserError as error:
        return complain(str(error))
    files = sorted(options.directory.glob("*.safetensors"))
    taken = sum(path.stat().st_blocks * 512 for path in files)
    print(f"{options.directory}: {byte_size(total)} of weights in {len(files)} files that take {byte_size(taken)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
