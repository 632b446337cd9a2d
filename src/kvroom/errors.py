"""Every error that kvroom raises on purpose.

A local error (the caller did something that is not allowed) and a remote error (a peer sent something that is not
allowed) are different classes: the first is a bug to fix in the calling code, the second ends the link to the peer.
Each message names the invalid value and the remedy.
"""

from __future__ import annotations


class KVRoomError(Exception):
    """The base class of all errors of kvroom."""


class ConfigurationError(KVRoomError):
    """A setting is missing or invalid, or contradicts another one. Nothing was started."""


class LocalRoomError(KVRoomError):
    """A call that the room's phase or the type of an argument does not allow. The room is unchanged."""


class RoomInUse(LocalRoomError):
    """A room with this number is open on the same side already. It is unchanged, and no second one was opened."""


class AddressNotAllowed(LocalRoomError):
    """A client named a bootstrap address that is not on the allow-list of this process. No request was sent to it."""


class RoomFailed(KVRoomError):
    """The hand-off failed. The text names room, side, phase, peer and cause, and is the same on both sides."""


class LimitExceeded(KVRoomError):
    """A limit (rooms, early arrivals, queue, frame) is reached. Nothing of the excess was kept or sent."""


class LayoutError(KVRoomError):
    """A region, layout or parallel description contradicts itself. It was not constructed."""


class PlanError(KVRoomError):
    """Two layouts, or a page list and a token window, cannot be copied byte for byte. Nothing was copied."""


class RemoteProtocolError(KVRoomError):
    """A peer sent bytes or a message that the protocol does not allow. The link over which they came must be closed."""


class AuthenticationError(RemoteProtocolError):
    """A peer did not prove that it has the shared secret or its own key, or it reached the wrong address."""


class LinkError(KVRoomError):
    """The control connection to a peer could not be opened. There is no link to it now; dialling again is allowed."""


class BootstrapError(KVRoomError):
    """The bootstrap directory could not be reached, refused the request, or has no entry that answers it."""


class TransportError(KVRoomError):
    """A transfer failed. Some, all or none of its bytes may have landed."""


class GrantRevoked(TransportError):
    """The sink revoked the grant, or never issued it. No byte landed after that."""


class InvalidRequest(KVRoomError):
    """A generation request that this model or this pool can never serve. No page was taken and no room was changed."""
