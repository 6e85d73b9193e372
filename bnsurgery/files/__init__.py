"""Files: written whole or not at all, by one process at a time, and read without trust.

Weights of strangers, our checkpoint, and what a file says of itself.
"""
