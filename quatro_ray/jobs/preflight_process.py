"""The program behind `prepare`: `python -m quatro_ray.jobs.preflight_process DESCRIPTOR`.

It reads the pickled configuration and writes the pickled result, or the error that a user can cause, to the descriptor.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys

from quatro_ray.errors import QuatroError
from quatro_ray.jobs.preflight import check
from quatro_ray.jobs.prepared import Prepared


def main() -> None:
    """Answer one request."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the caller's matter, without a traceback from here
    result: Prepared | QuatroError
    try:
        result = check(pickle.load(sys.stdin.buffer))
    except QuatroError as error:
        result = error
    with os.fdopen(int(sys.argv[1]), "wb") as answer:
        pickle.dump(result, answer)


if __name__ == "__main__":
    main()
