"""bnsurgery plan."""

from pathlib import Path
from typing import Any

import click

from .options import print_options, report, sites_options


@click.command("plan")
@click.argument("source", metavar="ARCH|FILE")
@sites_options
@print_options
def command(source: str, as_json: bool, quiet: bool, **choice: Any) -> None:
    """Show where BatchNorm would go, and for every other layer why not.

    ARCH is one of `bnsurgery archs`. FILE is a weights file, whose architecture is recognised, or a checkpoint of
    `bnsurgery insert`, of which is shown what was done.
    """
    import torch

    from bnsurgery import models, planning, pretrained
    from bnsurgery.checkpoint import read_record

    path = Path(source)
    if path.is_file() and (done := read_record(path)) is not None:
        in_python = f'bnsurgery.load("{source}", model=...) in Python'
        following = f"bnsurgery verify {source}" if done.architecture else in_python
        report(f"{done}\n\nNext: {following}", {"record": done.to_dict()}, as_json, quiet)
        return
    architecture = pretrained.recognise(path) if path.is_file() else models.architecture(source)
    # On the meta device: nothing is allocated, and the forward pass computes shapes only.
    example = torch.empty(1, 3, 224, 224, device="meta")
    plan = planning.plan(architecture.build("meta"), example, **choice)
    text = f"{plan}\n\nNext: bnsurgery insert {architecture.name}"
    report(text, {"architecture": architecture.name, **plan.to_dict()}, as_json, quiet)
