"""The figure of README's first screen, from measured results: the loss on insertion, and fine-tuning after it.

    python -m benchmarks.at_a_glance [--measure]

Draws benchmarks/results/at-a-glance.png from insertion.json and trash-vgg19.json beside it. `--measure` first makes
insertion.json anew: the test loss of mnist_cnn, a network that others trained, after putting BatchNorm in with
different weights and biases; it needs the folder with real networks. The other file is compare_tasks.py's.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import bnsurgery
from bnsurgery import finetune
from bnsurgery.files.writing import atomic_write
from bnsurgery.finetune.figures import draw_rates
from bnsurgery.pages.style import BN, PLAIN, WRONG, new_figure, write
from bnsurgery.text.words import percent

from .compare_tasks import RESULTS
from .tasks import real

WAYS: dict[str, Callable[[Any], tuple[Any, Any]] | None] = {
    "as it was": None,
    "inserted by bnsurgery": lambda norm: (norm.weight, norm.bias),
    "fresh: weight 1, bias 0": lambda norm: (torch.ones_like(norm.weight), torch.zeros_like(norm.bias)),
    "weight σ² instead of σ": lambda norm: (norm.running_var, norm.running_mean),
}
COLOURS = (PLAIN, BN, WRONG, WRONG)  # as those of the arms plain, bn and bn-naive in the panel beside it


@torch.no_grad()
def measure() -> dict[str, dict[str, float]]:
    """Loss, accuracy and largest change of an output on MNIST's test set, by how BatchNorm was put in."""
    model, (images, labels) = real().mnist_cnn(), real().mnist("test")
    calibration = list(real().mnist("train")[0][:2048].split(256))
    before = model(images)
    found = {}
    for name, parameters in WAYS.items():
        network = model if parameters is None else changed(model, calibration, parameters)
        outputs = network(images)
        found[name] = {
            "loss": F.cross_entropy(outputs, labels).item(),
            "accuracy": (outputs.argmax(1) == labels).double().mean().item(),
            "largest change": (outputs - before).abs().max().item(),
        }
        print(f"{name:26} {found[name]}")
    return found


def changed(
    model: nn.Module, calibration: list[torch.Tensor], parameters: Callable[[Any], tuple[Any, Any]]
) -> nn.Module:
    """With BatchNorm inserted, and these weights and biases."""
    network = bnsurgery.insert(model, calibration)
    for site in bnsurgery.record(network).sites:
        norm = network.get_submodule(site.norm)
        weight, bias = (value.clone() for value in parameters(norm))
        norm.load_state_dict({**norm.state_dict(), "weight": weight, "bias": bias})
    return network


def draw(losses: dict[str, dict[str, float]], comparison: finetune.Comparison) -> Any:
    """Two panels: the losses on insertion, the accuracies by learning rate."""
    said = ", ".join(f"{name} {entry['loss']:.3g}" for name, entry in losses.items())
    figure, axes = new_figure(
        f"Left: test loss after insertion: {said}. Right: validation accuracy by learning rate.", columns=2
    )
    bars, rates = axes[0]
    values = [entry["loss"] for entry in losses.values()]
    bars.barh(list(losses), values, color=COLOURS)
    for row, (value, entry) in enumerate(zip(values, losses.values(), strict=True)):
        bars.annotate(f" {value:.4g}   ({percent(entry['accuracy'], '.1f')})", (value, row), va="center").set_in_layout(
            False
        )
    bars.invert_yaxis()
    bars.set_xlim(0, 1.5 * max(values))
    bars.set(xlabel="loss (accuracy) on MNIST's test set", title="a trained CNN, BatchNorm put in")
    draw_rates(rates, comparison)
    rates.set_title("a small VGG-19 on photographs")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the losses anew")
    path = RESULTS / "insertion.json"
    if parser.parse_args().measure:
        text = json.dumps(measure(), indent=1, ensure_ascii=False) + "\n"
        with atomic_write(path, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    losses = json.loads(path.read_text(encoding="utf-8"))
    write(draw(losses, finetune.Comparison.read(RESULTS / "trash-vgg19.json")), RESULTS / "at-a-glance.png")


if __name__ == "__main__":
    main()
