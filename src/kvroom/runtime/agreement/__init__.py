"""The ranks of one engine agree on the state of their rooms, over sockets or over torch.distributed."""

from kvroom.runtime.agreement.collective import TorchCarrier
from kvroom.runtime.agreement.rooms import Agreement, AgreementError, Carrier, RankConsensus
from kvroom.runtime.agreement.sockets import SocketCarrier

__all__ = ["Agreement", "AgreementError", "Carrier", "RankConsensus", "SocketCarrier", "TorchCarrier"]
