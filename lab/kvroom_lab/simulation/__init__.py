"""Whole managers over a virtual clock, network and fabric: one seed is one run, and the same seed is the same run.

    world     virtual time, processes (an event loop each), the trace
    network   connections between processes: latency, partitions, silence, slow readers
    fabric    transfers that write block by block, with and without proof of their end
    pages     the pool of a process and its allocator
    node      the real manager in a process: links, resolver, driver, handles
    jobs      what engines do for a request: open, send, offer, abort, clear
    cluster   the workers, their processes one after the other
    scenario  from a seed to what is asked and what goes wrong, and when
    run       a seed from its first event to the checks at its end

`kvroom_lab.simulate` is the command.
"""
