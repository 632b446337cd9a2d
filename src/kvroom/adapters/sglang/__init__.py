"""The transfer backend `kvroom` of SGLang's prefill/decode disaggregation.

SGLang finds kvroom through the entry point group `sglang.srt.plugins` if both are installed in one environment, and the
option `--disaggregation-transfer-backend kvroom` selects it. `docs/sglang.md` describes how to run a pair.

The law: it translates. A request becomes a room, and the status of the room becomes the status that SGLang's queues
expect. The library decides the fate of a room, and SGLang that of a request. No file of SGLang is changed: the backend
uses SGLang's registries for plug-ins, hooks and the resolution of options.

SGLang calls `plugin` first, in each of its processes. Until the backend is chosen, `plugin` imports no other module of
kvroom, so a server that does not use kvroom does not pay for its imports.
"""
