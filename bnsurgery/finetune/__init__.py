"""Fine-tune an inserted network with `run` and `resume`; `compare` shows whether BatchNorm helps.

Needs the extra `finetune`. The training loop is in `loop.py`, its setup in `setup.py`. Every name in `__init__.pyi` is
loaded on first use, so that importing this package is fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
