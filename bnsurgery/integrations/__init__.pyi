# Every public name and its module: __init__.py loads each on first use.
from .pytorch_lightning import LightningCallback as LightningCallback
