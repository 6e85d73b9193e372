"""Every network of the zoo, and the real ones where they are: in, checked, out again. Writes docs/networks.md.

The page explains the columns. Takes some minutes.
"""

import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bnsurgery
from bnsurgery.running.batches import inputs as as_inputs
from bnsurgery.running.calls import run

from .timing import interleave, ratio
from .zoo import NETWORKS, images

HEADERS = ("network", "sites", "skipped", "bit-identical", "folds back", "ONNX max diff", "calibration ×")
PLACE = Path("docs/networks.md")
REAL = Path("../shared/real")
BATCH, ROUNDS = 4, 5
FULL = {"vgg11", "vgg13", "vgg16", "vgg19", "alexnet", "squeezenet1_0", "squeezenet1_1"}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rows, notes = [], []
    for name, model, calibration, fresh in networks():
        row, note = measure(name, model, calibration, fresh)
        print(*row, note or "", flush=True)
        rows.append(row)
        notes += [f"- {name}: {note}"] if note else []
    text = f"""# Networks

bnsurgery takes any network that `torch.fx` can follow on an example. The shapes are known then, so asserts and branches
on shapes go the example's way. It handles

- residual sums, concatenations, several inputs and outputs, and shared modules;
- grouped, depthwise, dilated and transposed convolutions in 1, 2 and 3 dimensions;
- dense layers, also on (N, T, C), and your own layers that return `F.conv2d`;
- parametrized layers, and any activation.

Layers that have a norm behind them are left alone. A submodule whose control flow depends on values is left out, and
`plan` prints the line that stopped the trace. If this is so for the network's `forward` itself, its parts are followed
one by one. `plan` names every layer that is left out, with the reason. AlexNet's local response normalization stays by
default. `drop_lrn=True` (`--drop-lrn`) removes it first, which changes the function, and reports by how much.

## Results

The table has every network that was tried: all are bit-identical, and all fold back to the same bits. 2,000 random
networks of the parts above passed the same checks (`BNSURGERY_EXAMPLES=2000 pytest tests/test_properties.py`).
`python -m benchmarks.networks` wrote this page.

{markdown(rows)}

- *bit-identical*: the outputs in eval mode are `torch.equal`, on inputs that were not used for calibration.
- *folds back*: the state dict after `fold` is `torch.equal`, key by key.
- *ONNX max diff*: the largest difference of the folded network's outputs in onnxruntime, divided by the largest output.
- *calibration ×*: the time of `calibrate` divided by that of a plain forward pass over the same two batches of {BATCH};
  medians of {ROUNDS} interleaved rounds. Calibration reads every activation once more. This is little time in a VGG and
  more in a network with few operations per activation (SqueezeNet). In a network that computes for a millisecond, the
  hooks dominate.
- torchvision's classifiers take 224 × 224 pixels here, the others the sizes in `benchmarks/zoo.py`, with random
  weights. Networks called *real* have trained weights.
{chr(10).join(notes)}

torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}.
"""
    PLACE.write_text(text)


def networks() -> Iterator[tuple[str, nn.Module, list[Any], list[Any]]]:
    """Name, network, two batches to calibrate on and a fresh one."""
    for name, network in NETWORKS.items():
        model = network.make()
        if name in FULL:
            make = images(224)
            yield name, model, [make(BATCH) for _ in range(2)], [make(BATCH)]
        else:
            yield name, model, network.batches(2, BATCH), network.batches(1, BATCH, seed=2)
    if (REAL / "real.py").is_file():
        sys.path.insert(0, str(REAL))
        import real

        for name, build in real.NETS.items():
            if name == "mnist_cnn":
                inputs = real.mnist("test")[0][: 3 * BATCH]
            elif "cifar" in name:
                inputs = images(32)(3 * BATCH).clamp(0, 1)
            else:
                inputs = real.photos(real.IMAGENET if "imagenet" in name else real.RGB01)[: 3 * BATCH]
            *calibration, fresh = inputs.split(BATCH)
            yield f"real {name}", build(), calibration, [fresh]


def measure(name: str, model: nn.Module, calibration: list[Any], fresh: list[Any]) -> tuple[tuple[Any, ...], str]:
    """A row of the table, and a remark."""
    plan = bnsurgery.plan(model, calibration[0])
    bn_model = bnsurgery.insert(model, calibration)
    identical = bnsurgery.verify(model, bn_model, fresh, drift_batch_sizes=()).bit_identical
    folded, original = bnsurgery.fold(bn_model).state_dict(), model.state_dict()
    same = list(folded) == list(original) and all(map(torch.equal, folded.values(), original.values()))
    note = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = bnsurgery.export(bn_model, Path(folder, "net.onnx"), to="onnx", example=fresh[0])
            onnx = f"{result.equivalence.max_rel:.1e}"
        except bnsurgery.ExportError as error:
            onnx, note = "–", str(error).removeprefix("export: ")
    times = interleave(
        {
            "forward": lambda: forward(model, calibration),
            "calibrate": lambda: bnsurgery.calibrate(model, plan, calibration),
        },
        rounds=ROUNDS,
    )
    cost = f"{ratio(times, 'calibrate', 'forward'):.2f}"
    yes = ("no", "yes")
    return (name, len(plan.sites), len(plan.skipped), yes[identical], yes[same], onnx, cost), note


def forward(model: nn.Module, batches: list[Any]) -> None:
    with torch.inference_mode():
        for batch in as_inputs(batches):
            run("forward", model, batch)


def markdown(rows: list[tuple[Any, ...]]) -> str:
    lines = [HEADERS, ["---", *["---:"] * (len(HEADERS) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    main()
