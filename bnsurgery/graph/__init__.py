"""What a network is made of, and what in it may get a BatchNorm; nothing in here changes a network.

Kinds of layers, its code followed, what really ran, what is refused; the plan that comes of it, and its picture.
"""
