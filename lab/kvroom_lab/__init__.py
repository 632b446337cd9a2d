"""The laboratory of kvroom: the explorer, the simulation, the soak, engines of several ranks, and doubles of hardware.

It is for development and comes with the sources only: `pip install -e lab`.
"""
