"""Parts with which a transport is built. None of them knows a transport; `docs/transports.md` lists them."""
