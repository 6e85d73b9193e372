"""Edits of a network, most of which keep what it computes: BatchNorm goes in, and comes out again.

ReLUs go into the norms, and back; torch's own layers or another head take a layer's place. The copies and the module
tree that edits are made on are here, too.
"""
