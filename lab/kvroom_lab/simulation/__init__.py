"""Whole managers over a virtual clock, network and fabric: a seed determines a run, down to the order of events.

    world     virtual time, processes (an event loop each), the trace
    network   connections between processes: latency, partitions, silence, slow readers
    fabric    transfers that write block by block, with and without proof of their end
    pages     the pool of a process and its allocator
    node      the real manager in a process: links, resolver, driver, handles
    jobs      the actions of engines for a request: open, send, offer, abort, clear
    cluster   the workers, and the successive processes of each
    scenario  the requests and faults of a seed, with their times
    run       one seed, from its first event to the checks at its end

`kvroom_lab.simulate` is the command.
"""
