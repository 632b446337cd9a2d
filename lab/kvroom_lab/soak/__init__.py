"""A soak: very many rooms between two processes with a given mix of faults, then a search for what they left behind.

`mix` determines what happens to each room, `pool` holds pages whose bytes identify their room, `faults` breaks
transfers and connections, `sides` plays the two engines, `worker` runs one of them in a process, `leftovers` searches
that process.
"""
