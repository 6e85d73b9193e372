# Every public name and its module: __init__.py loads each on first use.
from .comparing import compare as compare
from .comparison import ArmSummary as ArmSummary
from .comparison import Comparison as Comparison
from .comparison import Trial as Trial
from .config import Config as Config
from .datasets import Data as Data
from .datasets import from_tensors as from_tensors
from .head_fit import HeadFit as HeadFit
from .head_fit import fit_head_ as fit_head_
from .loop import DivergedError as DivergedError
from .results import Resolved as Resolved
from .results import Row as Row
from .results import TaskKind as TaskKind
from .runs import Result as Result
from .runs import resume as resume
from .runs import run as run
from .stopping import Interrupted as Interrupted
