"""Every error that kvroom raises on purpose.

A local fault (the caller asked for something that is not allowed) and a remote fault (a peer said something that is
not allowed) are different classes: the first is a bug to fix here, the second is a reason to end a link.
Each message names the value that was wrong and what to do about it.
"""

from __future__ import annotations


class KVRoomError(Exception):
    """Base of all of them."""


class ConfigurationError(KVRoomError):
    """A setting is missing, malformed or contradicts another one. Nothing was started."""


class LocalRoomError(KVRoomError):
    """The caller asked for something that the room's phase does not allow. The room is unchanged."""


class RoomInUse(LocalRoomError):
    """A second room with this number was opened on the same side while the first is open. The first is untouched."""


class AddressNotAllowed(LocalRoomError):
    """A bootstrap address that a client named is not on the list of this process. It was not asked."""


class RoomFailed(KVRoomError):
    """The hand-off ended without success. The text says room, side, phase, peer and cause, alike on both sides."""


class LimitExceeded(KVRoomError):
    """A stated limit (rooms, early arrivals, queue, frame) is full. Nothing was kept of what came over it."""


class LayoutError(KVRoomError):
    """A region or layout contradicts itself. It was not constructed."""


class PlanError(KVRoomError):
    """Two layouts, or a page list and a token window, cannot be copied byte for byte. Nothing was copied."""


class RemoteProtocolError(KVRoomError):
    """A peer sent bytes or a message that the protocol does not allow. The link that carried it must be closed."""


class AuthenticationError(RemoteProtocolError):
    """A peer does not know the shared secret, or this side has none where one is required."""


class LinkError(KVRoomError):
    """The control connection to a peer could not be opened. There is none to it now; dialling again is allowed."""


class BootstrapError(KVRoomError):
    """The bootstrap directory could not be reached, refused the request, or has no answer."""


class TransportError(KVRoomError):
    """Blocks could not be moved. Some, all or none of the bytes of that transfer may have landed."""


class GrantRevoked(TransportError):
    """The receiving side took its leave to write back, or never gave it: nothing landed after that."""


class InvalidRequest(KVRoomError):
    """A generation request that this model or this pool can never serve. No page was taken, no room was touched."""
