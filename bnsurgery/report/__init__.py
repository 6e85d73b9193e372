"""See what was done: one self-contained HTML page each for an insertion, a run and a comparison, and their figures.

`insertion`, `training` and `comparison` give a `Report`, with `save`, `save_figures` and `figures`; the `plot_`
functions give the same matplotlib figures singly. Needs the extra `report`. Every name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnsurgery.finetune.figures import plot_comparison, plot_curves, plot_rate_range
    from bnsurgery.pages.page import Report

    from .insertion_figures import plot_channels, plot_drift, plot_moments, plot_preactivations
    from .insertion_page import insertion
    from .sites import SiteView, view_sites
    from .training_page import comparison, training

_HOMES = {
    "Report": "pages.page",
    "SiteView": "report.sites",
    "comparison": "report.training_page",
    "insertion": "report.insertion_page",
    "plot_channels": "report.insertion_figures",
    "plot_comparison": "finetune.figures",
    "plot_curves": "finetune.figures",
    "plot_drift": "report.insertion_figures",
    "plot_moments": "report.insertion_figures",
    "plot_preactivations": "report.insertion_figures",
    "plot_rate_range": "finetune.figures",
    "training": "report.training_page",
    "view_sites": "report.sites",
}

__all__ = [
    "Report",
    "SiteView",
    "comparison",
    "insertion",
    "plot_channels",
    "plot_comparison",
    "plot_curves",
    "plot_drift",
    "plot_moments",
    "plot_preactivations",
    "plot_rate_range",
    "training",
    "view_sites",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"bnsurgery.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
