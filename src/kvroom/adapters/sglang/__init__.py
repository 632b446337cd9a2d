"""The transfer backend `kvroom` of SGLang's prefill/decode disaggregation.

Installed beside SGLang, kvroom is found through the entry point group `sglang.srt.plugins`, and
`--disaggregation-transfer-backend kvroom` selects it. See `docs/sglang.md` for how to run a pair.

The law: it translates. A request becomes a room, and the room's status becomes a status of SGLang's queues. The
library decides the fate of a room, and SGLang that of a request. SGLang's files stay unchanged: the adapter uses its
plug-in, hook and resolution registries.

SGLang first calls `plugin`, in each of its processes. It imports nothing else of kvroom until the backend is chosen,
so that a server that does not use it pays nothing.
"""
