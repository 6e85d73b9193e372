"""bnsurgery plan."""

from functools import partial

from bnsurgery.files.writing import atomic_write

from . import options
from .cmd_insert import command as insert
from .options import PATH, Checkpoint, Network, Values, given, group, option, typed, with_flags
from .output import claim, force_option, overwrite, show, subcommand

_SIDE = 224  # pixels: of the input of a network of one's own if it is not given; the plan hardly depends on it


@subcommand("plan")
@options.network(weights_help="As for insert; only a file is read.")
@options.image_size
@options.example
@options.sites
@group(
    "drawings",
    dict,
    option("dot", "File to write the graph to, for Graphviz.", PATH, metavar="FILE"),
    option("svg", "File to draw the graph in.", PATH, metavar="FILE"),
)
@force_option
def command(network: Network, image_size: str | None, example: str | None, sites: Values, drawings: Values) -> None:
    """Show where BatchNorm would go, and why not elsewhere.

    ARCH is one of `bnsurgery archs`, or timm:NAME. FILE is an ONNX file, or a file of weights: of the architecture that
    they fit, or of the network that --model makes. FILE may also be a checkpoint of `bnsurgery insert`; the command
    then shows where BatchNorm went.
    """
    from bnsurgery.files.checkpoint import read_record
    from bnsurgery.graph import drawing, planning
    from bnsurgery.images.preprocessing import Wanted
    from bnsurgery.networks import factories, interface, pretrained
    from bnsurgery.surgery.copies import on_meta

    if network.file is not None and (record := read_record(network.file)) is not None:
        made = None if record.architecture else str(record.provenance.get("model", "MODULE:FUNCTION"))
        after = typed("verify", *Checkpoint(network.file, made).words)
        return show(f"{record}\n\nNext: {after}", {"record": record.to_dict()})
    files = [(file, getattr(drawing, kind)) for kind, file in drawings.items() if file is not None]
    for file, _ in files:
        claim(file)
    name, weights = network.name, network.weights
    if network.own:
        timms = factories.is_timm(name) and weights == "DEFAULT"
        model, _ = pretrained.own_network(name, "random" if timms else weights, choice=network.choice)
        side = None if factories.is_onnx(name) else _SIDE
        preprocess = partial(interface.own_preprocessing, model, Wanted(image_size or side))
    else:
        architecture = network.architecture
        if network.file is None and weights not in ("DEFAULT", "random", *architecture.weight_names):
            found = pretrained.load(architecture, weights, choice=network.choice, wanted=Wanted(image_size))
            architecture, model = found.architecture, on_meta(found.model)
        else:
            model = architecture.build("meta")
        name, preprocess = architecture.name, partial(interface.preprocessing, architecture, wanted=Wanted(image_size))
    batch = options.first_batch(example)
    if batch is None:
        batch = interface.example(preprocess(), on_meta=not network.own)
    plan = planning.plan(model, batch, **sites)
    for file, draw in files:
        with atomic_write(file, overwrite=overwrite()) as temporary:
            temporary.write_text(draw(model, batch, plan), encoding="utf-8", newline="\n")
    wrote = "".join(f"Wrote {file}.\n" for file, _ in files)
    after = typed("insert", *given(leave_out=("dot", "svg")))
    text = with_flags(str(plan), insert)  # which has the same options, and more
    show(f"{text}\n\n{wrote}Next: {after}", {"architecture": name, **plan.to_dict()})
