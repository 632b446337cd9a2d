"""The transfer backend `kvroom` of SGLang's prefill/decode disaggregation.

Installed beside SGLang, kvroom is found through the entry point group `sglang.srt.plugins`, and
`--disaggregation-transfer-backend kvroom` selects it. See `docs/sglang.md` for how to run a pair.

The law: it translates. A request becomes a room and the room's status becomes what SGLang's queues understand; what
becomes of a room is decided by `kvroom.runtime`, and what becomes of a request by SGLang. SGLang's own files stay as
they are: everything goes through its plug-in, hook and resolution registries.

`plugin` is what SGLang calls first, in each of its processes. It imports nothing else of kvroom until the backend is
chosen, so that a server which does not use it pays nothing.
"""
