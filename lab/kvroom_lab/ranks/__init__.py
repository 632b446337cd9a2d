"""Hand-offs between engines of several ranks, each rank a real process, with every byte of every pool checked.

`python -m kvroom_lab.ranks` runs the list of `cases`, over any transport.
"""
