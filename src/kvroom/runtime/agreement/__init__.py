"""Agreement of the ranks of one engine; see `rooms`. An engine brings its own carrier, or torch's process group."""

from .collective import TorchCarrier
from .rooms import Agreement, AgreementError, Carrier, RankConsensus

__all__ = ["Agreement", "AgreementError", "Carrier", "RankConsensus", "TorchCarrier"]
