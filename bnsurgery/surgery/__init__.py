"""Edits of a network: BatchNorm in and out, ReLUs into the norms and back, torch's layers, another head.

The copies that are edited and the edits of the module tree are here, too.
"""
