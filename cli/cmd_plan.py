"""bnsurgery plan."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from .options import (
    PATH,
    Network,
    batches_option,
    given,
    image_size_option,
    network_options,
    option,
    sites_options,
    typed,
)
from .output import claim, force_option, overwrite, print_options, show


@click.command("plan")
@network_options(weights="As for insert; only a file is read.")
@image_size_option
@batches_option
@sites_options
@option("dot", "Write the graph for Graphviz.", type=PATH, metavar="FILE")
@option("svg", "Draw the graph.", type=PATH, metavar="FILE")
@force_option("Replace these files if they exist.")
@print_options
def command(
    network: Network,
    image_size: str | None,
    example: Callable[[], Any],
    sites: dict[str, Any],
    dot: Path | None,
    svg: Path | None,
) -> None:
    """Show where BatchNorm would go, and why not elsewhere.

    ARCH is one of `bnsurgery archs`, or timm:NAME. FILE is an ONNX file, or a file of weights: of the architecture that
    they fit, or of the network that --model makes. FILE may also be a checkpoint of `bnsurgery insert`; the command
    then shows where BatchNorm went.
    """
    from bnsurgery.files import writing
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.graph import drawing, planning
    from bnsurgery.images.preprocessing import Wanted
    from bnsurgery.networks import factories, interface, pretrained
    from bnsurgery.surgery.copies import on_meta

    if network.file is not None and (record := read_record(network.file)) is not None:
        made = str(record.provenance.get("model", "MODULE:FUNCTION"))
        after = typed("verify", str(network.file), *(["--model", made] if record.architecture is None else []))
        show(f"{record}\n\nNext: {after}", {"record": record.to_dict()})
        return
    drawings = [(file, draw) for file, draw in ((dot, drawing.dot), (svg, drawing.svg)) if file is not None]
    for file, _ in drawings:
        claim(file)
    name, weights = network.name, network.weights
    if network.own:
        timms = name.startswith("timm:") and weights == "DEFAULT"
        model, _ = pretrained.own_network(name, "random" if timms else weights, choice=network.choice)
        side = None if factories.is_onnx(name) else _SIDE
        preprocess = partial(interface.own_preprocessing, model, Wanted(image_size or side))
    else:
        architecture = network.architecture
        name = architecture.name
        if network.file is None and weights not in ("DEFAULT", "random", *architecture.weight_names):
            found = pretrained.load(architecture, weights, choice=network.choice, wanted=Wanted(image_size))
            architecture, model = found.architecture, on_meta(found.model)
        else:
            model = architecture.build("meta")
        preprocess = partial(interface.preprocessing, architecture, wanted=Wanted(image_size))
    batch = example()
    if batch is None:
        batch = interface.example(preprocess(), on_meta=not network.own)
    plan = planning.plan(model, batch, **sites)
    for file, draw in drawings:
        with writing.atomic_write(file, overwrite=overwrite()) as temporary:
            temporary.write_text(draw(model, batch, plan), encoding="utf-8", newline="\n")
    wrote = "".join(f"Wrote {file}.\n" for file, _ in drawings)
    after = typed("insert", *given(leave_out=("dot", "svg")))
    show(f"{plan}\n\n{wrote}Next: {after}", {"architecture": name, **plan.to_dict()})


_SIDE = 224  # pixels: of an own network's input if it is not given; the plan hardly depends on it
