"""Pages and figures: what they say, that they need nothing else, and that names in them are only names."""

import copy
import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import nn

import bnsurgery
from benchmarks import at_a_glance
from bnsurgery import finetune, report
from bnsurgery.finetune.comparison import ARMS, Comparison, Trial
from bnsurgery.finetune.results import NormRow, Resolved, Row, TaskKind
from bnsurgery.pages.glossary import TERMS
from bnsurgery.report.site_statistics import view_sites
from bnsurgery.report.strip import boxes
from bnsurgery.statistics.verification import statistics_for
from bnsurgery.text.tables import is_number


def rows(*accuracies):
    return tuple(
        Row(i + 1.0, 10 * (i + 1), 0.1, 1.0 / (i + 1), a, 1.1 / (i + 1), a, 99.0) for i, a in enumerate(accuracies)
    )


RESOLVED = Resolved(0.1, "batch", "a batch of 64 is large enough", "as asked", "kept", "crop", "as asked", 64)
RESULT = finetune.Result(None, rows(0.5, 0.75), RESOLVED)
NORMS = tuple(
    NormRow(step, name, 64, dead, 0.0 if dead else 0.1 * step, 0.5 * step, 2.0 * step)
    for step in (10, 20)
    for name, dead in (("_first.$x$", 0), ("second.<b>", step - 10))
)
COMPARISON = Comparison(
    "tiny on patterns",
    (
        Trial("plain", 0.1, 0, "none", None, rows(0.3, 0.6), 2.0),
        Trial("plain", 1.0, 0, "none", "the loss is NaN after step 3", (), 1.0),
        Trial("bn", 0.1, 0, "batch", None, rows(0.4, 0.7), 3.0),
        Trial("bn", 1.0, 0, "batch", None, rows(0.5, 0.8), 5.0),
    ),
)


class Outline(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_insertion(insertion_page):
    page = insertion_page
    assert page.good is True and "same output bits on 12 images" in page.verdict
    text = re.sub(r"\s+", " ", Outline(page.to_html()).text)
    assert "3 BatchNorm layers were inserted." in text
    for heading in ("The network", "Statistics by site", "Pre-activations", "Train-mode drift", "What it costs"):
        assert heading in text
    assert re.search(r"\d+ dead, \d+ near eps, \d+ silent", text)
    assert "a batch of 2 is too small for statistics" in text
    assert "activation units" in text and "σ² = eps" in text


def test_a_difference_is_said_and_where(odd, inserted, batches):
    with torch.no_grad():
        inserted.head.bias[2] += 0.5
    page = report.insertion(odd, inserted, batches)
    assert page.good is False and "NOT the same" in page.verdict
    where = dict(page.facts)["largest difference"]
    assert re.search(r"0\.5, relative .*, at image \d+, index \[2\]", where)
    assert report.insertion(odd, inserted, batches, tolerance=1e3).good is True


def tables(page):
    return {section.heading: section.table for section in page.sections if section.table}


def test_tables_of_an_insertion(odd, inserted, batches):
    """Every number again, from what it is defined by."""
    result = bnsurgery.verify(odd, inserted, batches, drift_batch_sizes=report.insertion_page.DRIFT_SIZES)
    page = report.insertion(odd, inserted, batches)
    statistics, channels, drift, costs = tables(page).values()
    listed = dict(zip(channels.headers, channels.rows[0], strict=True))
    assert (listed["site"], listed["dead"], listed["near eps"]) == ("part.<b>$x$</b>", "0", "2")
    assert "1" in listed["silent"].split(", ")
    for row in statistics.rows:
        norm = inserted.get_submodule({s.site.name: s.norm for s in bnsurgery.record(inserted).sites}[row[0]])
        mean, std = norm.running_mean.double(), norm.running_var.double().sqrt()
        assert row[2] == len(mean)
        assert row[3:5] == pytest.approx((np.median(mean.abs()), np.median(std)))
        assert row[5] == int((std**2 < 1e-5).sum())
    assert [row[:2] for row in drift.rows] == [
        (size, f"{100 * value:.3g} %") for size, value in result.train_drift.items() if size < 12
    ]
    assert [row[0] for row in costs.rows] == ["parameters", "training step, milliseconds", "kept for backward, MiB"]
    before, after = (sum(p.numel() for p in network.parameters()) for network in (odd, inserted))
    assert costs.rows[0][1:] == (before, after, after / before) and after > before
    assert costs.rows[2][2] > costs.rows[2][1] > 0  # BatchNorm keeps more


@pytest.mark.parametrize(
    ("size", "drift", "mode"), [(2, 0.0, "running"), (4, 0.1, "batch"), (4, 0.3, "renorm"), (32, 0.9, "batch")]
)
def test_the_mode_to_set(size, drift, mode):
    assert statistics_for(size, lambda: drift)[0] == mode


def test_a_mode_that_is_set_is_named_and_not_judged(odd, inserted, batches):
    bnsurgery.set_statistics_(inserted, "running")
    page = report.insertion(odd, inserted, batches)
    assert tables(page)["Train-mode drift"].headers == ("images a batch", "drift")
    section = next(s for s in page.sections if s.heading == "Train-mode drift")
    assert "mode that is set: running" in section.paragraphs[0]
    assert page.figures["drift"].axes[0].get_legend() is None


def test_a_batch_of_all_images_says_nothing_of_drift(odd, inserted, batches):
    rows = tables(report.insertion(odd, inserted, [torch.cat(batches)[:8]]))["Train-mode drift"].rows
    assert [row[0] for row in rows] == [2, 4]  # 8 may be the calibration images: rounding noise


def test_the_strip_has_every_norm_behind_its_layer(inserted):
    for taken in (0, 1):
        labels = {part: [box.label for box in found] for part, found in boxes(inserted).items()}
        assert labels == {
            "part": ["Conv2d 6", "BN 6", "ReLU"],
            "": ["Conv2d 6", "BN 6", "Linear 5", "BN 5", "Linear 4"],
        }
        kinds = [box.kind for found in boxes(inserted).values() for box in found]
        assert kinds.count("inserted") == 3 and kinds.count("taken") == taken
        bnsurgery.fuse_relu_(inserted)


def test_a_fused_network_looks_the_same(odd, inserted, batches):
    """Before and behind the normalization; and the page says which norms apply their ReLU."""
    fused = copy.deepcopy(inserted)
    bnsurgery.fuse_relu_(fused)
    for one, two in zip(view_sites(inserted, batches), view_sites(fused, batches), strict=True):
        assert torch.equal(one.before.counts, two.before.counts) and torch.equal(one.after.counts, two.after.counts)
        assert (one.activation, one.dead, one.silent) == (two.activation, two.dead, two.silent)
    text = report.insertion(odd, fused, batches).to_html()
    assert "3 BatchNorm layers were inserted; 1 of them" in re.sub(r"\s+", " ", text)


def test_the_strip_shows_a_parametrized_layer_as_such(batches):
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    model = bnsurgery.insert(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), batches)
    assert [box.label for box in boxes(model)[""]] == ["Conv2d 4", "BN 4", "ReLU", "Conv2d 2"]


def test_absorbed_biases_are_no_failure(batches):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 2, 3)).eval()
    page = report.insertion(model, bnsurgery.insert(model, batches, absorb_bias=True), batches)
    assert page.good is True and "up to" in page.verdict
    assert "exactly" not in Outline(page.to_html()).text


def test_statistics_that_are_not_finite(odd, inserted, batches):
    inserted.twice.norm.running_var[1] = torch.nan
    with pytest.raises(bnsurgery.CalibrationError, match="'twice.norm': NaN or Inf in its running statistics"):
        report.plot_moments(inserted)


@pytest.mark.slow
def test_names_that_no_file_may_hold(batches, tmp_path):
    model = nn.Sequential()
    model.add_module("a\x1b[31m\x00", nn.Conv2d(3, 4, 1))
    model.add_module("b", nn.Conv2d(4, 2, 1))
    page = report.insertion(model.eval(), bnsurgery.insert(model.eval(), batches), batches)
    for path in page.save_figures(tmp_path):
        if path.suffix == ".svg":
            ElementTree.parse(path)
    assert not {"\x1b", "\x00"} & set(page.to_html())


def test_a_trained_network_and_few_images(odd, inserted, batches):
    page = report.insertion(bnsurgery.fold(inserted), inserted, [batches[0][:1]])
    text = Outline(page.to_html()).text
    assert "Not measured: it takes 2 inputs, got 1." in text and "needs two images" in text


def test_a_generator_and_no_data_are_refused(odd, inserted, batches):
    with pytest.raises(ValueError, match="only once"):
        report.insertion(odd, inserted, iter(batches))
    result = bnsurgery.verify(odd, inserted, batches)
    with pytest.raises(bnsurgery.CalibrationError, match="no data"):
        report.insertion(odd, inserted, [], result=result)


@pytest.mark.slow
def test_a_function_as_reference(odd, inserted, batches):
    text = Outline(report.insertion(lambda x: odd(x), inserted, batches).to_html()).text
    assert "the reference is a function" in text


def test_comparison():
    page = report.comparison(COMPARISON)
    text = Outline(page.to_html()).text
    assert page.verdict == COMPARISON.verdict() and page.verdict in text
    assert "plain at 1, seed 0: the loss is NaN after step 3" in text
    assert "diverges" in text and "80.00 %" in text
    labels = {name: figure.get_label() for name, figure in page.figures.items()}
    assert "× at 1" in labels["by-rate"] and "bn ends at 80.0 % at rate 1" in labels["by-step"]
    assert "plain 2" in labels["time"] and "bn 4" in labels["time"]  # without the one that diverged
    assert dict(page.facts)["judged on"].startswith("the validation part") and "task" not in dict(page.facts)
    more = {"test_accuracy": 0.5, "start_accuracy": 0.25, "kind": TaskKind(0.5, 0.48, 300, 0.03)}
    tested = tuple(t if t.diverged else dataclasses.replace(t, **more) for t in COMPARISON.trials)
    page = report.comparison(Comparison("tested", tested))
    facts, arms = dict(page.facts), page.sections[0].table
    assert facts["judged on"] == "the test part" and facts["task"].startswith("far: ")
    verdict = dataclasses.replace(page, verdict="rates, " * 100 + "the end").to_html()
    assert "rates, the end</p>" in verdict  # not cut
    assert arms.headers[2:4] == ("at start", "accuracy") and arms.cells[0][2:4] == ["25.00 %", "50.00 %"]


def test_only_options_that_mean_something_are_shown():
    """A function's own batches have their size, and a network of one's own has the weights that its function gives."""
    config = finetune.Config(data="sounds.py:six", model="sounds.py:net", output="runs/x", epochs=2)
    resolved = dataclasses.replace(RESOLVED, batch_size=16, augment="none")
    page = report.training(dataclasses.replace(RESULT, resolved=resolved), config)
    options = dict(page.sections[-1].table.rows)
    assert options["batch_size"] == "16" and dict(page.facts)["head"] == "kept"
    assert not {"weights", "val_fraction", "augment", "normalize", "root", "download", "skip_bad"} & {*options}
    images = report.training(RESULT, dataclasses.replace(config, data="photos", model=None, source="vgg11"))
    options = dict(images.sections[-1].table.rows)
    assert (options["weights"], options["augment"], options["val_fraction"]) == ("DEFAULT", "crop", "0.2")


def test_training(tmp_path):
    config = finetune.Config(data="patterns", output="runs/x", source="vgg11", epochs=2)
    page = report.training(RESULT, config)
    stopped = report.training(RESULT, dataclasses.replace(config, epochs=5)).verdict
    assert "in epoch 2 of 5. The run was stopped" in stopped
    text = Outline(page.to_html()).text
    assert page.verdict == "75.00 % of the validation images right, in epoch 2 of 2."
    assert "vgg11 fine-tuned on patterns" in text and "a batch of 64 is large enough" in text
    assert not {"at start", "task"} & {*dict(page.facts)}
    measured = dataclasses.replace(RESOLVED, start_accuracy=0.25, kind=TaskKind(0.67, 0.48, 300, 0.03))
    facts = dict(report.training(dataclasses.replace(RESULT, resolved=measured), config).facts)
    assert facts["at start"] == "25.00 %" and facts["task"].startswith("near: ")


def test_the_norms_of_a_run():
    config = finetune.Config(data="patterns", output="runs/x", source="vgg11", epochs=2)
    page = report.training(dataclasses.replace(RESULT, norms=NORMS), config)
    section = next(section for section in page.sections if section.heading == "BatchNorms over training")
    assert section.paragraphs == (
        "Of 128 channels in 2 norms, 10 are dead at the end, the largest share at second.<b>: 10 of 64.",
    )
    assert section.table.cells == [
        ["_first.$x$", "64", "0", "0", "5.00", "10.0", "2.00", "40.0"],
        ["second.<b>", "64", "0", "10", "5.00", "10.0", "0.00", "40.0"],
    ]
    assert list(section.figures) == ["norms-dead", "norms-smallest", "norms-median", "norms-largest"]
    dead, smallest, *_ = (figure.axes[0] for figure in section.figures.values())
    assert [list(line.get_ydata()) for line in dead.lines] == [[0, 100 * 10 / 64]]
    assert [list(line.get_ydata()) for line in smallest.lines] == [[1, 2], [1, 1e-6]]
    names = [text.get_text() for text in smallest.get_legend().get_texts()]
    assert names == ["_first.$x$", "second.<b>"]
    once = report.training(dataclasses.replace(RESULT, norms=NORMS[:2]), config)
    assert not [name for name in once.figures if name.startswith("norms")]
    without = [section.heading for section in report.training(RESULT, config).sections]
    assert "BatchNorms over training" not in without


def test_many_norms_are_drawn_and_few_are_named():
    rows = [NormRow(step, f"layers.{i}", 64, i % 2, 0.1, 0.5, 2.0) for step in (10, 20) for i in range(60)]
    dead, median = report.plot_norms(rows, ("dead", "median")).axes
    assert (len(dead.lines), len(median.lines)) == (30, 60)
    assert [text.get_text() for text in median.get_legend().get_texts()] == ["first: layers.0", "last: layers.59"]
    assert len(dead.get_legend().get_texts()) == 4


@pytest.fixture(params=["insertion", "comparison", "training"], scope="module")
def any_page(request, insertion_page):
    """A page of each kind, and its text."""
    config = finetune.Config(data="<i>data</i>", output="runs/x", source="vgg11")
    page = {
        "insertion": lambda: insertion_page,
        "comparison": lambda: report.comparison(COMPARISON),
        "training": lambda: report.training(dataclasses.replace(RESULT, norms=NORMS), config),
    }[request.param]()
    return page, page.to_html()


def test_self_contained_and_only_text(any_page):
    _, html = any_page
    outline = Outline(html)
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "iframe", "object", "embed", "b", "i", "img"}  # <b>, <i>: names in the network, data
    for tag, attributes in outline.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value.startswith(("#", "data:")), (tag, value)
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", html))
    assert all(a.startswith("http://www.w3.org/") for a in addresses)  # namespaces, which nobody fetches
    assert "@import" not in html and "url(http" not in html
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_one_style_of_numbers(any_page):
    _, html = any_page
    outline = Outline(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    labels = [attributes["aria-label"] for tag, attributes in outline.tags if tag == "svg"]
    text = " ".join([outline.text, *labels])
    assert re.search(r"\d %", text) and not re.search(r"\d%", text)


def test_alt_texts_and_definitions(any_page):
    page, html = any_page
    outline = Outline(html)
    drawings = [attributes for tag, attributes in outline.tags if tag == "svg"]
    assert len(drawings) == len(page.figures) > 0
    assert all(len(d["aria-label"]) > 20 and d["role"] == "img" for d in drawings)
    words = [attributes for tag, attributes in outline.tags if attributes.get("class") == "term"]
    assert words and all(word["title"] in TERMS.values() and word["title"] in outline.text for word in words)
    anchors = {attributes.get("id") for _, attributes in outline.tags}
    assert {word["href"].removeprefix("#") for word in words} <= anchors
    for table in (section.table for section in page.sections if section.table):
        for header, numeric in zip(table.headers, table.numeric, strict=True):
            assert not numeric or header in TERMS or is_number(header), f"what is {header}?"


@pytest.mark.slow
def test_the_same_twice(odd, inserted, batches):
    """But for the cost, which is a time."""
    pages = [report.insertion(odd, inserted, batches) for _ in range(2)]
    first, second = (dataclasses.replace(page, sections=page.sections[:-1]).to_html() for page in pages)
    assert first == second


@pytest.mark.slow
def test_saved_whole_or_not_at_all(insertion_page, tmp_path):
    page, path = insertion_page, tmp_path / "page.html"
    page.save(path)
    assert path.read_text(encoding="utf-8") == page.to_html()
    with pytest.raises(bnsurgery.CheckpointError, match="existing file"):
        page.save(path)
    page.save(path, overwrite=True)
    written = page.save_figures(tmp_path / "new" / "figures")
    assert {p.name for p in written} == {f"{name}.{kind}" for name in page.figures for kind in ("svg", "png")}
    for picture in written:
        if picture.suffix == ".png":
            with Image.open(picture) as image:
                assert len(image.convert("L").getcolors(maxcolors=256) or range(256)) > 10  # something is drawn
        else:
            assert "<svg" in picture.read_text()
    with pytest.raises(bnsurgery.CheckpointError, match="existing file"):
        page.save_figures(tmp_path / "new" / "figures")
    (tmp_path / "file").write_text("")
    with pytest.raises(bnsurgery.CheckpointError, match="Choose another place"):
        page.save_figures(tmp_path / "file" / "in")


def test_plots_from_python(inserted, batches):
    """What is drawn, read back from the axes."""
    figure = report.plot_moments(inserted)
    means, deviations = figure.axes
    assert [label.get_text() for label in means.get_yticklabels()] == ["part.<b>$x$</b>", "twice", "tokens"]
    assert deviations.get_xscale() == "log"
    medians = [line.get_xdata()[0] for line in means.lines if line.get_linewidth() == 1.4]
    expected = [v.mean.quantile(0.5).item() for v in report.view_sites(inserted)]
    assert medians == pytest.approx(expected)
    drift = bnsurgery.verify(inserted, inserted, batches, drift_batch_sizes=(2, 4)).train_drift
    axis = report.plot_drift(bnsurgery.verify(inserted, inserted, batches, drift_batch_sizes=(2, 4))).axes[0]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([100 * drift[2], 100 * drift[4]])
    assert len(report.plot_preactivations(inserted, batches).axes) == 2
    bars = report.plot_channels(inserted, batches).axes[0].patches
    assert bars[0].get_width() == pytest.approx(100 / 6)  # one of the first site's six channels is dead


def test_plots_of_a_comparison():
    steps, rates = report.plot_comparison(COMPARISON).axes
    assert {line.get_label(): list(line.get_ydata()) for line in steps.lines} == {
        "plain at 0.1": pytest.approx([30, 60]),
        "bn at 1": pytest.approx([50, 80]),
    }
    crosses = [line for line in rates.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[pytest.approx(1.0, rel=0.1)]]  # beside the others'
    loss, accuracy = report.plot_curves(RESULT.rows).axes
    assert list(accuracy.lines[1].get_ydata()) == [50, 75] and list(loss.lines[0].get_ydata()) == [1.0, 0.5]


def test_curves_begin_with_the_accuracy_before_training():
    result = dataclasses.replace(RESULT, resolved=dataclasses.replace(RESOLVED, start_accuracy=0.25))
    figures = report.training(result, finetune.Config(data="photos", output="runs/x", source="vgg11")).figures
    points = {
        name: [list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines]
        for name, figure in figures.items()
    }
    assert points == {
        "loss": [[(1, 1.0), (2, 0.5)], [(1, pytest.approx(1.1)), (2, pytest.approx(0.55))]],
        "accuracy": [[(1, 50), (2, 75)], [(0, 25), (1, 50), (2, 75)]],
    }
    trials = [
        dataclasses.replace(trial, seed=seed, start_accuracy=start)
        for trial in COMPARISON.trials if trial.arm == "bn"
        for seed, start in ((0, 0.2), (1, 0.3))
    ]  # fmt: skip
    (steps,) = report.plot_comparison(Comparison("two seeds", tuple(trials)), ("steps",)).axes
    assert list(zip(*steps.lines[0].get_data(), strict=True)) == [(0, pytest.approx(25)), (10, 50), (20, 80)]
    band = steps.collections[0].get_paths()[0].vertices
    assert {y for x, y in band.tolist() if x == 0} == {20, 30}


def test_no_label_is_cut_off(inserted, batches):
    """However long the names of the sites."""
    views = [dataclasses.replace(view, name="w" * 40) for view in view_sites(inserted, batches)]
    drawn = [report.plot_moments(views, (panel,)) for panel in ("mean", "std")]
    drawn += [report.plot_preactivations(views, panels=(panel,)) for panel in ("before", "after")]
    for figure in (*drawn, report.plot_channels(views)):
        figure.draw_without_rendering()
        box = figure.axes[0].xaxis.label.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0


def rows_of(axis):
    """The names at an axis, and where its rows begin and end in the figure once it is drawn."""
    axis.figure.draw_without_rendering()
    box = axis.get_position()
    return [label.get_text() for label in axis.get_yticklabels()], axis.get_ylim(), box.y0, box.y1


@pytest.mark.parametrize("panels", [("moments-mean", "moments-std"), ("preactivations-before", "preactivations-after")])
def test_charts_side_by_side_line_up(panels, insertion_page):
    one, two = (copy.deepcopy(insertion_page.figures[panel]).axes[0] for panel in panels)
    assert rows_of(one) == rows_of(two)


def test_only_sites_with_channels_that_say_little_are_drawn(odd, batches):
    healthy = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.Tanh()))).eval()
    model = nn.Sequential(odd.part, nn.Conv2d(6, 3, 1), nn.Tanh(), *healthy[:4], nn.Conv2d(3, 2, 1)).eval()
    for conv in (model[1], *healthy[::2]):
        nn.init.dirac_(conv.weight)
    model[1].weight.data.add_(0.5)
    with pytest.warns(bnsurgery.BNSurgeryWarning, match="dead"):
        inserted = bnsurgery.insert(model, batches)
    figure = report.plot_channels(inserted, batches)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [
        row[0] for row in tables(report.insertion(model, inserted, batches))["Dead, near-eps and silent channels"].rows
    ]
    assert names == ["0.<b>$x$</b>"] and figure.axes[0].get_xlabel().endswith("none at 3 other sites")
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    silent = int((odd.part(torch.cat(batches)).amax((0, 2, 3)) == 0).sum())
    assert bars == pytest.approx([100 / 6, 100 / 6, 100 * silent / 6]) and silent  # dead, near eps, silent

    inserted = bnsurgery.insert(healthy, batches)
    page = report.insertion(healthy, inserted, batches)
    section = next(s for s in page.sections if s.heading == "Dead, near-eps and silent channels")
    assert section.paragraphs == ("None of 6 channels is dead, near eps or silent on these images.",)
    assert not section.figures and section.table is None
    assert not report.plot_channels(inserted, batches).axes[0].patches
    assert "now applied by" not in page.to_html()


def bars_of(axis):
    """Name, length and written value of every bar."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    return list(zip(names, [bar.get_width() for bar in axis.patches], [t.get_text() for t in axis.texts], strict=True))


def test_what_has_one_point_is_drawn_as_bars():
    loss, accuracy = report.plot_curves(rows(0.467)).axes
    assert bars_of(loss) == [("training", 1.0, "1.00"), ("validation", pytest.approx(1.1), "1.10")]
    assert bars_of(accuracy) == [(kind, pytest.approx(46.7), "46.7 %") for kind in ("training", "validation")]
    assert accuracy.get_xlabel() == "accuracy (%) after 1 epoch" and not accuracy.lines
    (accuracy,) = report.plot_curves(rows(0.467), ("accuracy",), start=0.25).axes
    assert bars_of(accuracy)[2:] == [("validation at the start", 25, "25.0 %")]
    one = Comparison(
        "one rate",
        (
            Trial("plain", 0.1, 0, "none", None, rows(0.467), 2712.3),
            Trial("bn", 0.1, 0, "batch", None, rows(0.5), 3.0),
            Trial("bn-naive", 0.1, 0, "batch", "NaN", (), 3.0),
        ),
    )
    drawn = [("plain", pytest.approx(46.7), "46.7 %"), ("bn", 50, "50.0 %"), ("bn-naive", 0, "diverged")]
    (steps,) = report.plot_comparison(one).axes
    assert bars_of(steps) == [(f"{arm} at 0.1" if arm != "bn-naive" else arm, *rest) for arm, *rest in drawn]
    (rates,) = report.plot_comparison(one, ("rates",)).axes
    assert bars_of(rates) == drawn
    page = report.comparison(one)
    assert "Only 0.1 was tried" in Outline(page.to_html()).text and list(page.figures) == ["by-step", "time"]
    assert [text.get_text() for text in page.figures["time"].axes[0].texts] == ["2712 s", "3.00 s"]


def test_nothing_is_drawn_of_runs_that_all_diverged():
    page = report.comparison(
        Comparison("none", tuple(dataclasses.replace(COMPARISON.trials[1], lr=lr) for lr in (1, 2)))
    )
    assert not page.figures and "Every run diverged" in Outline(page.to_html()).text
    steps, _ = report.plot_comparison(Comparison("none", COMPARISON.trials[1:2]), ("steps", "rates")).axes
    assert bars_of(steps) == [("plain", 0, "diverged")]


def test_thousands_are_separated():
    long = tuple(dataclasses.replace(row, step=31250, images_per_second=12345.6) for row in RESULT.rows)
    config = finetune.Config(data="patterns", output="runs/x", source="vgg11", epochs=2)
    page = report.training(dataclasses.replace(RESULT, rows=long), config)
    assert dict(page.facts)["steps"] == "31,250"
    validations = tables(page)["Validations"]
    assert validations.cells[0][1] == "31,250" and validations.cells[0][-1] == "12,346"
    assert validations.numeric[1:] == [True] * 7


def test_one_meaning_a_colour():
    """README's figure: what was put in has the colour of the arm trained beside it; no two arms share one."""
    trials = tuple(dataclasses.replace(t, arm=arm) for arm in ARMS for t in COMPARISON.of("bn"))
    losses = {name: {"loss": 1.0, "accuracy": 0.5} for name in at_a_glance.WAYS}
    left, right = at_a_glance.draw(losses, Comparison("all", trials)).axes
    arms = {line.get_label(): to_hex(line.get_color()) for line in right.lines}
    bars = [to_hex(bar.get_facecolor()) for bar in left.patches]
    assert bars == [arms["plain"], arms["bn"], arms["bn-naive"], arms["bn-naive"]]
    assert len(set(arms.values())) == len(ARMS)
    times = report.plot_comparison(Comparison("all", trials), ("seconds",)).axes[0]
    assert [to_hex(bar.get_facecolor()) for bar in times.patches] == [arms[arm] for arm in ARMS]


def test_colours_of_an_insertion(inserted, batches):
    """Without BatchNorm as plain, with it as bn; what is dead as the mistake; curves have none of these."""
    arms = {line.get_label().split()[0]: line.get_color() for line in report.plot_comparison(COMPARISON).axes[0].lines}
    before, after = report.plot_preactivations(inserted, batches).axes
    assert to_hex(before.collections[0].get_facecolor()[0]) == arms["plain"]
    assert to_hex(after.collections[0].get_facecolor()[0]) == arms["bn"]
    dead = report.plot_channels(inserted, batches).axes[0].patches[0].get_facecolor()
    curves = {line.get_color() for line in report.plot_curves(RESULT.rows).axes[0].lines}
    assert not {to_hex(dead), *curves} & set(arms.values())
