"""`make demo`: the whole round trip on a full-size VGG-16, run as a user would run it; then, does BatchNorm help?

Weights: torchvision's pretrained ones where they can be had, else random ones, said plainly. Images: the two
photographs that scikit-learn brings along. All that is written into a temporary directory. The comparison fine-tunes a
small VGG of MNIST to scikit-learn's digits, with and without BatchNorm, into demo-results/.
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.tasks import TASKS
from bnsurgery import finetune, report
from bnsurgery.networks import pretrained
from bnsurgery.records import architectures

SEED = 0
RESULTS = Path("demo-results")


def bnsurgery(folder: Path, command: str) -> int:
    """Run one command in `folder`, its output shown; returns the exit code."""
    print(f"\n$ bnsurgery {command}", flush=True)
    executable = Path(sys.executable).parent / "bnsurgery"
    return subprocess.run([executable, *shlex.split(command)], cwd=folder).returncode


def compare() -> None:
    """Fine-tune a small VGG that knows MNIST to digits of another scanner, without and with BatchNorm."""
    print("\nDoes BatchNorm help? A small VGG of MNIST learns scikit-learn's digits, those of another scanner.")
    task = TASKS["digits-scanner"]
    shutil.rmtree(RESULTS, ignore_errors=True)
    config = replace(task.config, source="small VGG", output=str(RESULTS))
    options = {"arms": ("plain", "bn", "bn-naive"), "rates": (0.01, 0.03, 0.1, 0.3), "seeds": 2, "jobs": 2}
    result = finetune.compare(config, model=task.network(), data=task.data(), show=True, **options)
    report.comparison(result).save(RESULTS / "comparison.html")
    print(f"\n{result}\n\nTo look at: {RESULTS / 'comparison.html'}")


def main() -> int:
    """Both parts; 0 where the round trip gave back the weights at the start, bit for bit."""
    code = round_trip()
    if code == 0:
        compare()
    return code


def round_trip() -> int:
    """Insert, verify, fold; then compare the folded file with the weights at the start."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = "DEFAULT"
        if bnsurgery(folder, "insert vgg16"):
            print("\nThat did not work, for the reason above. Going on with RANDOM weights: same network, same steps.")
            weights = "random"
            if bnsurgery(folder, f"insert vgg16 --weights random --seed {SEED}"):
                return 1
        if bnsurgery(folder, "verify vgg16-bn.safetensors --num-images 16"):
            return 1
        if bnsurgery(folder, "fold vgg16-bn.safetensors"):
            return 1
        print("\nThe folded file against the weights it started from:")
        start = pretrained.load(architectures.architecture("vgg16"), weights, seed=SEED).model.state_dict()
        folded = load_file(folder / "vgg16-folded.safetensors")
        equal = [name for name, tensor in start.items() if torch.equal(folded[name], tensor)]
        same_keys = set(folded) == set(start)
        print(f"{len(equal)} of {len(start)} tensors bit-identical, keys {'the same' if same_keys else 'DIFFERENT'}")
        return 0 if same_keys and len(equal) == len(start) else 1


if __name__ == "__main__":
    sys.exit(main())
