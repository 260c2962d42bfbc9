"""guardsmith's command line, and after what it prints the peak memory of its process in bytes: python peak.py harden ..."""

import sys
from pathlib import Path


def peak_rss() -> int:
    """The most memory that this process has had, in bytes; getrusage would tell of the process that started it, too."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    from guardsmith.cli.app import main

    code = main(sys.argv[1:])
    print(peak_rss())
    sys.exit(code)
