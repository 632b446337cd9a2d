"""Agreement of the ranks of one engine; see `rooms`. An engine brings its own carrier, or torch's process group."""

from kvroom.runtime.agreement.collective import TorchCarrier
from kvroom.runtime.agreement.rooms import Agreement, AgreementError, Carrier, RankConsensus

__all__ = ["Agreement", "AgreementError", "Carrier", "RankConsensus", "TorchCarrier"]
