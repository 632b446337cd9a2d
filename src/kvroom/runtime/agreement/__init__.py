"""Agreement of the ranks of one engine; see `rooms`. An engine uses `TorchCarrier` or implements a `Carrier`."""

from .collective import TorchCarrier
from .rooms import Agreement, AgreementError, Carrier, RankConsensus

__all__ = ["Agreement", "AgreementError", "Carrier", "RankConsensus", "TorchCarrier"]
