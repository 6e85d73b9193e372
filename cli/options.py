"""Options that several commands share, and how they print."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_POSITIVE = click.IntRange(min=1)


def sites_options(function: F) -> F:
    """Which layers get a BatchNorm: --layers, --placement, --head."""
    for option in (
        click.option("--head", is_flag=True, help="Also put one behind the output layer."),
        click.option(
            "--placement",
            type=click.Choice(["pre-activation", "post-activation"]),
            default="pre-activation",
            show_default=True,
            help="Before the activation, as in the BN paper, or behind it.",
        ),
        click.option(
            "--layers",
            type=click.Choice(["all", "conv", "dense"]),
            default="all",
            show_default=True,
            help="Which layers get a BatchNorm; conv gives torchvision's vgg*_bn layout.",
        ),
    ):
        function = option(function)
    return function


def data_options(num_images: int) -> Callable[[F], F]:
    """Which images, and how: --data, --num-images, --batch-size, --image-size, --skip-bad, --seed, --device."""

    def decorate(function: F) -> F:
        for option in (
            click.option("--device", default="cpu", show_default=True, help="Where to compute, such as cuda."),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**63 - 1),
                default=0,
                show_default=True,
                help="Of every random choice.",
            ),
            click.option("--skip-bad", is_flag=True, help="Leave out damaged images, and count them."),
            click.option(
                "--image-size", type=click.IntRange(1, 4096), help="Side in pixels.  [default: the weights' own, 224]"
            ),
            click.option("--batch-size", type=_POSITIVE, default=8, show_default=True, help="Images at a time."),
            click.option(
                "--num-images", type=_POSITIVE, default=num_images, show_default=True, help="How many images at most."
            ),
            click.option(
                "--data",
                default="samples",
                show_default=True,
                metavar="DIR|samples",
                help="Folder of JPEG, PNG or WebP images, searched through; or two built-in photographs, cropped.",
            ),
        ):
            function = option(function)
        return function

    return decorate


def output_options(function: F) -> F:
    """Where to write: --output, --force."""
    function = click.option("--force", is_flag=True, help="Replace the output file if it exists.")(function)
    return click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help=_OUTPUT_HELP)(function)


_OUTPUT_HELP = "File to write.  [default: ARCH-bn.safetensors or ARCH-folded.safetensors, here]"


def print_options(function: F) -> F:
    """How to report: --json, --quiet."""
    function = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors and warnings.")(function)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")(
        function
    )


def report(text: str, data: dict[str, Any], as_json: bool, quiet: bool = False) -> None:
    """Print a result as the user asked for it."""
    if as_json:
        click.echo(json.dumps(data, ensure_ascii=False))
    elif not quiet:
        click.echo(text)
