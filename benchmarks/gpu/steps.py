"""The steps, in order of value. A new step is a line here and the function that it names, which takes a `Job`."""

from dataclasses import dataclass

BUDGET = 685  # seconds for all: such a machine can be had for 15 minutes, starting it included


@dataclass(frozen=True)
class Step:
    """What runs in a process of its own.

    Attributes:
        name: for `--steps` and the results.
        description: in words.
        limit: seconds after which it is killed.
        function: "module:function", called with a `Job`; imported in the step's own process alone.
    """

    name: str
    description: str
    limit: float
    function: str


STEPS = (
    Step("environment", "the machine, its versions and its two ceilings", 30, "benchmarks.gpu.environment:step"),
    Step("op", "the op against float64; bit identity of insertion", 105, "benchmarks.gpu.checks:op"),
    Step("norm", "BatchNorm + ReLU against torch, eager and compiled", 70, "benchmarks.gpu.norm:step"),
    Step("train_step", "a training step and its memory", 70, "benchmarks.train_step:step"),
    Step("launches", "kernels launched, host time, CUDA graphs, compile", 60, "benchmarks.gpu.launches:step"),
    Step("calibration", "calibration ÷ plain forward", 25, "benchmarks.calibration:step"),
    Step("training", "autocast, NCCL, resumed fine-tuning", 40, "benchmarks.gpu.checks:training"),
    Step("sanitizer", "compute-sanitizer over every kernel", 45, "benchmarks.gpu.sanitizer:step"),
    Step("squeezenet", "SqueezeNet 1.0 to photographs, arm by arm", 120, "benchmarks.gpu.photographs:squeezenet"),
    Step("vgg16", "VGG-16 from three classes to three others", 120, "benchmarks.gpu.photographs:vgg16"),
)
