"""`bnsurgery --help`, whole process."""

import subprocess
import sys
from pathlib import Path

from bnsurgery.text.tables import table

from .timing import interleave, median


def main() -> None:
    command = Path(sys.executable).parent / "bnsurgery"

    def run(*args):
        subprocess.run(args, check=True, capture_output=True)

    times = interleave(
        {
            "python -c pass": lambda: run(sys.executable, "-c", "pass"),
            "bnsurgery --help": lambda: run(command, "--help"),
            "bnsurgery insert --help": lambda: run(command, "insert", "--help"),
        },
        rounds=9,
    )
    print(table(("process", "seconds"), [(name, median(seconds)) for name, seconds in times.items()]))
    print("goal: bnsurgery --help at most 0.25 s")


if __name__ == "__main__":
    main()
