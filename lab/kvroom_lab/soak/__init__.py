"""A soak: very many rooms between two processes with a stated mix of faults, and a search for whatever they left.

`mix` says what happens to each room, `pool` holds pages whose bytes tell whose they are, `faults` breaks things,
`sides` plays the two engines, `worker` runs one of them in a process, `leftovers` searches that process.
"""
