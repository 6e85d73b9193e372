"""`bnsurgery insert vgg16 --weights FILE` with 64 images, whole process, against its unavoidable parts.

Those are, in one process as well: importing torch and torchvision, a 64-image forward pass in batches of 8 with the
weights of that file, and writing a file of that size.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchvision import models

from bnsurgery.text.tables import table

from .timing import interleave, median, ratio

ROUNDS = 5
UNAVOIDABLE = """
import sys, torch, torchvision
from safetensors.torch import load_file, save_file
with torch.device("meta"):
    model = torchvision.models.vgg16(weights=None).eval()
state = {name: tensor.clone() for name, tensor in load_file(sys.argv[1]).items()}
model.load_state_dict(state, assign=True)
torch.manual_seed(0)
with torch.inference_mode():
    for batch in torch.randn(64, 3, 224, 224).split(8):
        model(batch)
save_file(state, sys.argv[2])
"""
PEAK = """
import resource, runpy, sys
try:
    sys.argv = sys.argv[1:]
    runpy.run_module("bnsurgery.cli", run_name="__main__")
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, file=sys.stderr)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights, out = Path(folder) / "vgg16.safetensors", Path(folder) / "out.safetensors"
        torch.manual_seed(0)
        save_file(models.vgg16(weights=None).state_dict(), weights)
        insert = ["insert", "vgg16", "--weights", weights, "--output", out, "--force", "--quiet"]

        def run(*command):
            return subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True)

        times = interleave(
            {
                "unavoidable": lambda: run("-c", UNAVOIDABLE, weights, out),
                "bnsurgery insert": lambda: run("-m", "bnsurgery.cli", *insert),
            },
            rounds=ROUNDS,
        )
        peak = float(run("-c", PEAK, "bnsurgery", *insert).stderr.split()[-1])
    rows = [(name, median(seconds), ratio(times, name, "unavoidable")) for name, seconds in times.items()]
    print(table(("process", "seconds", "ratio"), rows))
    print(f"peak memory {peak:.2f} GiB")
    print("goals: at most 1.15 × the unavoidable, at most 2.5 GiB")


if __name__ == "__main__":
    main()
