"""Insertion, recalibration and folding as parts of other people's training loops.

Each needs its library, which is loaded on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
