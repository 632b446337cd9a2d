"""Small blocks, packed: gathered by the source, written one-sidedly as few large ones, scattered by the sink.

    source                                                sink
      lease (grant)                                   ->  a slot of its staging is leased to this connection
                                                      <-  slot
      gather into a slot of its own, write it by the engine into the sink's slot
      unpack (slot, grant, dst[n], length[n])         ->  checked against the grant, scattered into the pages
                                                      <-  landed: the lease has ended

Begin at `protocol.py`; `slots.py` is the table of leases, `server.py` the sink's side, `client.py` and `sender.py` the
source's.

A slot into which a write could still be under way is never leased again. While a lease runs, its writer may write. It
ends when the writer says on the same connection that its write is over (`unpack`, `release`). A lease whose connection
has ended, or whose grant was revoked, is quarantined: until its writer says so all the same, until it connects again,
which it does only when nothing of it is on its way, or until a fence proves that it is dead. Time proves nothing.

The sink does this writing itself, so it enforces the grant: nothing is unpacked outside of it, and when `revoke` has
returned nothing is unpacked under it any more. `revoke` still answers that it proves nothing: the same peer could write
the same pages directly, and whether it did the sink cannot know.
"""
