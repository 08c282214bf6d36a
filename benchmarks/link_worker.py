"""One worker of links.py: joins the others by gloo over the shaped interface and calls one function of one file.

python link_worker.py FILE FUNCTION SETTINGS   with settings as JSON; a line of JSON a thing that the function yields
"""

import json
import os
import runpy
import sys
import threading

from teacherstudent.distributed import connect

TIMEOUT_SECONDS = 300.0


def end_with_owner() -> None:
    """Leave when the pipe from the process that started this one closes, be it that it was killed."""
    sys.stdin.read()
    os._exit(1)


def main(path: str, name: str, settings: str) -> None:
    threading.Thread(target=end_with_owner, daemon=True).start()
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is no result
    function = runpy.run_path(path, run_name="link_worker")[name]
    with connect(timeout_seconds=TIMEOUT_SECONDS) as comm:
        for result in function(comm, **json.loads(settings)):
            print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
