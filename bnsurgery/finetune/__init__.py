"""Fine-tune an inserted network: `run` and `resume`, and `compare`, which finds out whether BatchNorm helped.

Needs the extra `finetune`. The loop is `loop.py`, whole; what is set up before it, `setup.py`.
"""

from .config import Config
from .datasets import Data, from_tensors
from .runs import Result, resume, run
from .stopping import Interrupted

__all__ = ["Config", "Data", "Interrupted", "Result", "from_tensors", "resume", "run"]
