"""kvroom hands the KV cache of an LLM request from the worker that prefilled it to the worker that decodes it."""
