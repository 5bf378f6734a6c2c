"""What `start_detached` runs: `python -m ling_flow.serving MODEL_DIR NAME FINGERPRINT HOST PORT`."""

from __future__ import annotations

import sys
from pathlib import Path

from ling_flow.errors import LingFlowError
from ling_flow.serving.server import serve_foreground


def main(arguments: list[str]) -> int:
    """Serve until told to stop; the exit code."""
    model_dir, model_name, fingerprint, host, port = arguments
    try:
        serve_foreground(Path(model_dir), model_name, int(port), fingerprint, host)
    except LingFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
