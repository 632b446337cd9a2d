"""A small torch engine on transformers models: a reference for whoever puts kvroom into an engine of their own.

`weights.load` a model, then open a `prefill.PrefillEngine` or a `decode.DecodeEngine` on it. Needs the extra `engine`.

What a model keeps is found by `shape.probe`; `pool` has the memory for it, `pages` says who holds which page, `prefix`
which page holds which tokens, and a `lease` is what one request has of all that.
"""
