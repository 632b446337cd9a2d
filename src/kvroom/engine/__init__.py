"""A small torch engine on transformers models: a reference for whoever puts kvroom into an engine of their own.

`weights.load` a model, then open a `prefill.PrefillEngine` or a `decode.DecodeEngine` on it. Needs the extra `engine`.
"""
