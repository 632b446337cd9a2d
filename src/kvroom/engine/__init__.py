"""A small torch engine on transformers models: the reference for putting kvroom into an engine of your own.

Load a model with `weights.load`, then open a `prefill.PrefillEngine` or a `decode.DecodeEngine` on it. This needs the
extra `engine`.

`shape.probe` finds the keys, values and states that a model keeps for each request. `pool` allocates the memory for
them, `pages` records the holder of each page, and `prefix` records the tokens in each page. A `lease` is the share of
all this that one request holds.
"""
