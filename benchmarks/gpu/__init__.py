"""Everything that a GPU is needed for, in one command: see `__main__.py`. Steps are registered in `steps.py`."""
