"""Contents of the pages: one self-contained HTML page for an insertion, a run or a comparison, and its figures.

`insertion`, `training` and `comparison` return a `Report`, with `save`, `save_figures` and `figures`; the `plot_`
functions return its matplotlib figures one by one. Needs the extra `report`, whose libraries load on first use.
"""

from bnsurgery.finetune.figures import plot_comparison, plot_curves, plot_norms, plot_rate_range
from bnsurgery.pages.page import Report

from .insertion_figures import plot_channels, plot_drift, plot_moments, plot_preactivations
from .insertion_page import insertion
from .site_statistics import SiteView, view_sites
from .training_page import comparison, training

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
    "plot_norms",
    "plot_preactivations",
    "plot_rate_range",
    "training",
    "view_sites",
]
