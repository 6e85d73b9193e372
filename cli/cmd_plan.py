"""bnsurgery plan."""

from pathlib import Path
from typing import Any

import click

from bnsurgery.system import quote

from .options import claim, image_size_option, model_option, named, print_options, show, sites_options


@click.command("plan")
@click.argument("source", required=False, metavar="ARCH|FILE")
@model_option
@image_size_option
@sites_options
@click.option("--dot", type=click.Path(path_type=Path), metavar="FILE", help="Write the graph for Graphviz.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw the graph.")
@click.option("--force", is_flag=True, help="Replace these files if they exist.")
@print_options
def command(
    source: str | None,
    model: str | None,
    image_size: int | None,
    dot: Path | None,
    svg: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **choice: Any,
) -> None:
    """Show where BatchNorm would go, and for every other layer why not.

    ARCH is one of `bnsurgery archs`, or timm:NAME. FILE is an ONNX file, a weights file, whose architecture is
    recognised, or a checkpoint of `bnsurgery insert`, of which is shown what was done.
    """
    from bnsurgery import drawing, files, models, planning, pretrained
    from bnsurgery.checkpoint import read_record

    name, own = named(source, model, "ARCH or FILE")
    path = Path(name)
    if not own and path.is_file() and (done := read_record(path)) is not None:
        made = str(done.provenance.get("model", "MODULE:FUNCTION"))
        custom = f" --model {quote(made)}" if done.architecture is None else ""
        show(f"{done}\n\nNext: bnsurgery verify {quote(name)}{custom}", {"record": done.to_dict()}, as_json, quiet)
        return
    for file in (dot, svg):
        if file is not None:
            claim(file, force)
    if own:
        weights = "random" if name.startswith("timm:") else "DEFAULT"
        found = pretrained.load_own(name, weights, image_size=image_size or (None if name.endswith(".onnx") else _SIDE))
        network = found.model
    else:
        architecture = pretrained.recognise(path) if path.is_file() else models.architecture(name)
        name, network = architecture.name, architecture.build("meta")
        preprocess = pretrained.preprocessing(architecture, image_size=image_size)
        found = pretrained.Pretrained(name, network, architecture, "none", preprocess)
    example = pretrained.example(found)
    plan = planning.plan(network, example, **choice)
    wrote = []
    for file, draw in ((dot, drawing.dot), (svg, drawing.svg)):
        if file is not None:
            text = draw(network, example, plan)
            with files.atomic_write(file, overwrite=force) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
            wrote.append(f"Wrote {file}.\n")
    words = ["bnsurgery insert", *(["--model"] if model is not None else []), quote(name)]
    words += ["--image-size", str(image_size)] if image_size is not None else []
    words += ["--head"] if choice["head"] else []
    for option, default in (("layers", "all"), ("placement", "pre-activation")):
        words += [f"--{option}", choice[option]] if choice[option] != default else []
    text = f"{plan}\n\n{''.join(wrote)}Next: {' '.join(words)}"
    show(text, {"architecture": name, **plan.to_dict()}, as_json, quiet)


_SIDE = 224  # pixels: of an own network's input where it is not said; a plan hardly depends on it
