"""Packed transfers of small blocks: the source gathers them, writes them as one large block, and the sink scatters it.

    source                                                sink
      LEASE (grant)                                   ->  leases a staging slot to this connection
                                                      <-  the number of the slot
      gathers blocks into a slot of its own; its engine
      writes that slot into the sink's slot
      UNPACK (slot, grant, dst[n], length[n])         ->  checks the blocks against the grant, scatters them into pages
                                                      <-  done: the lease has ended

Begin at `protocol.py`. `slots.py` is the table of leases, `server.py` the sink's side, `client.py` and `sender.py` the
source's side. The theory of operation is at the top of `server.py`: its rules, and the case that each rule excludes.

The law: a slot that a write may still reach is never leased again. While a lease lasts, its writer may write. The lease
ends when the writer reports over the same connection that its write is over (UNPACK, RELEASE). If the grant is revoked
first, the slot is quarantined until that report comes. If the connection ends first, the slot is quarantined until its
writer connects again (it does so only when none of its writes is in flight), or until a fence proves that the writer is
dead. No timeout frees a slot.

The sink scatters the bytes itself, so it enforces the grant: nothing is unpacked outside of it, and once `revoke` has
returned, nothing more is unpacked under it. The transport's `revoke` still returns False (not proven): the same peer
can write the same pages directly through its engine, and the sink cannot see if it does.
"""
