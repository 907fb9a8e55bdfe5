"""Runs a script that cannot reach any other machine: guarded.py ATTEMPTS SCRIPT [ARGUMENT ...].

Every connection and look-up that Python makes, by whatever library, passes the audit hook: those that do not stay on
this machine are written to the file ATTEMPTS and refused.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = {None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1"}


def main(attempts: str, script: str, *arguments: str) -> None:
    def guard(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.sendto"):
            host = args[1][0] if isinstance(args[1], tuple) else ""  # a path is a socket of this machine
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        else:
            return
        if host not in HERE:
            with open(attempts, "a") as file:
                file.write(f"{event} {host}\n")
            raise OSError(f"{host} is out of reach")

    sys.addaudithook(guard)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
