"""The structure of a network and the plan for BatchNorm in it; nothing here changes a network.

Kinds of layers, tracing the code, observing a run, refusing unsupported models, the plan and its picture.
"""
