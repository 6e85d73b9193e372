"""bnsurgery plan."""

from pathlib import Path
from typing import Any

import click

from bnsurgery.machine.system import quote

from .options import (
    batches_option,
    claim,
    first_batch,
    given,
    image_size_option,
    model_option,
    named,
    print_options,
    show,
    sites_options,
    weights_options,
)


@click.command("plan")
@click.argument("source", required=False, metavar="ARCH|FILE")
@model_option
@click.option(
    "--weights",
    default="DEFAULT",
    show_default=True,
    metavar="DEFAULT|NAME|random|PATH",
    help="As for insert; only a file is read.",
)
@weights_options
@image_size_option
@batches_option
@sites_options
@click.option("--dot", type=click.Path(path_type=Path), metavar="FILE", help="Write the graph for Graphviz.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw the graph.")
@click.option("--force", is_flag=True, help="Replace these files if they exist.")
@print_options
@click.pass_context
def command(
    context: click.Context,
    source: str | None,
    model: str | None,
    weights: str,
    weights_key: str | None,
    weights_prefix: str | None,
    partial: bool,
    image_size: str | None,
    data: str | None,
    dot: Path | None,
    svg: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **choice: Any,
) -> None:
    """Show where BatchNorm would go, and for every other layer why not.

    ARCH is one of `bnsurgery archs`, or timm:NAME. FILE is an ONNX file; or one of weights, whose architecture is
    recognised, or that of what --model makes; or a checkpoint of `bnsurgery insert`, of which is shown what was done.
    """
    from bnsurgery.files import writing
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.graph import drawing, planning
    from bnsurgery.images.preprocessing import Wanted
    from bnsurgery.networks import factories, interface, pretrained
    from bnsurgery.networks.fitting import Choice
    from bnsurgery.records import architectures
    from bnsurgery.surgery.copies import on_meta

    name, own, weights, is_file = named(source, model, weights)
    taken = Choice(weights_key, weights_prefix, partial)
    if source is not None and Path(source).is_file() and (done := read_record(source)) is not None:
        made = str(done.provenance.get("model", "MODULE:FUNCTION"))
        custom = f" --model {quote(made)}" if done.architecture is None else ""
        show(f"{done}\n\nNext: bnsurgery verify {quote(source)}{custom}", {"record": done.to_dict()}, as_json, quiet)
        return
    for file in (dot, svg):
        if file is not None:
            claim(file, force)
    if own:
        timms = name.startswith("timm:") and weights == "DEFAULT"
        network, _ = pretrained.own_network(name, "random" if timms else weights, choice=taken)
    else:
        architecture = pretrained.recognise(Path(name), taken) if is_file else architectures.architecture(name)
        if not is_file and weights not in ("DEFAULT", "random", *architecture.weight_names):
            found = pretrained.load(architecture, weights, choice=taken, wanted=Wanted(image_size))
            architecture, network = found.architecture or architecture, on_meta(found.model)
        else:
            network = architecture.build("meta")
        name = architecture.name
    example: Any
    if data is not None:
        example = first_batch(data)
    elif own:
        wanted = Wanted(image_size or (None if factories.is_onnx(name) else _SIDE))  # an ONNX file says it
        example = interface.example(interface.own_preprocessing(network, wanted), on_meta=False)
    else:
        example = interface.example(interface.preprocessing(architecture, wanted=Wanted(image_size)), on_meta=True)
    plan = planning.plan(network, example, **choice)
    wrote = []
    for file, draw in ((dot, drawing.dot), (svg, drawing.svg)):
        if file is not None:
            text = draw(network, example, plan)
            with writing.atomic_write(file, overwrite=force) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
            wrote.append(f"Wrote {file}.\n")
    words = ["bnsurgery", "insert", *given(context, leave_out=_OURS)]
    text = f"{plan}\n\n{''.join(wrote)}Next: {' '.join(map(quote, words))}"
    show(text, {"architecture": name, **plan.to_dict()}, as_json, quiet)


_OURS = ("dot", "svg", "force", "as_json", "quiet")
_SIDE = 224  # pixels: of an own network's input where it is not said; a plan hardly depends on it
