"""Everything that a GPU is needed for, in one command and at most twelve minutes.

    python -m benchmarks.gpu --output DIR [--data FOLDER] [--steps op,norm] [--quick] [--device cpu]
    python -m benchmarks.gpu --markdown DIR/results.json > benchmarks/results/GPU.md

Needs torch, Triton and what bnsurgery needs, nothing installed and no network: start it at the repository's root.
FOLDER holds the real networks and photographs, 37 MB; without it random ones take their place. It is made by

    mkdir -p .gpu-data && cp -r ../shared/real/{real.py,nets,photos,trash} .gpu-data

DIR gets two files: results.json, replaced as a whole whenever a step reports, and log.txt, with all output. A step that
fails or hangs stops no other. A step that the machine refuses, or that cannot be done there, is no failure.
"""

import argparse
import json
import sys
from pathlib import Path

from . import driver, job, report
from .steps import STEPS


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # whatever the locale, ÷ must not be the end
    names = ", ".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for results.json and log.txt")
    parser.add_argument("--data", type=Path, default=Path(".gpu-data"), help="default: .gpu-data")
    parser.add_argument("--steps", type=lambda text: text.split(","), help=f"some of: {names}")
    parser.add_argument("--quick", action="store_true", help="everything as small as it gets")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try it where no GPU is")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="print a report of a results.json, and run nothing"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)  # these three are how a step's process is started
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.markdown:
        print(report.markdown(json.loads(args.markdown.read_text(encoding="utf-8"))))
        return
    data = args.data.resolve() if (args.data / "real.py").is_file() else None
    if args.step:
        sys.exit(job.run(args.step, job.Job(args.device, args.quick, data, args.seconds, args.rows)))
    if unknown := set(args.steps or ()) - {step.name for step in STEPS}:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {names}")
    if not args.output:
        parser.error("--output DIR is missing")
    if data is None:
        print(f"{args.data}: no real.py in it: random networks and images instead of real ones", flush=True)
    chosen = [step for step in STEPS if not args.steps or step.name in args.steps]
    sys.exit(0 if driver.run(chosen, args.output, args.device, args.quick, data).good else 1)


if __name__ == "__main__":
    main()
