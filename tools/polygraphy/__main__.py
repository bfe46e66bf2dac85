"""Polygraphy's command line with our plugins known to TensorRT.

    python -m moecompiler.tools.polygraphy run|inspect|convert|debug|surgeon …

Polygraphy loads plugins from shared libraries (``--plugins``); ours are Python classes, whose kernels are in the engines. Where
there is no TensorRT, this is ``polygraphy`` itself. What ``polygraphy debug --check`` starts is another process: give it this
command again.
"""

from __future__ import annotations

import importlib.util
import sys

from moecompiler.errors import UserError
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.tools.printing import USER_ERROR, complaint


def main() -> int:
    """The exit status is Polygraphy's, or 2 where plugins cannot be registered."""
    if importlib.util.find_spec("tensorrt") is not None:
        try:
            TensorRTPlugins().register()
        except UserError as error:
            print(complaint(str(error)), file=sys.stderr)
            return USER_ERROR
    from polygraphy.tools import main as run_polygraphy

    return int(run_polygraphy())


if __name__ == "__main__":
    sys.exit(main())
