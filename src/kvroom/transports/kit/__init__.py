"""Building blocks of transports. None of them depends on a particular transport; `docs/transports.md` lists them."""
