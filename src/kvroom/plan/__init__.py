"""Plans: from two layouts and two page lists to the blocks to copy. Pure NumPy, no I/O."""

from kvroom.plan.assignment import shares
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.plan.hash_order import Strip, strips
from kvroom.plan.intersection import Part
from kvroom.plan.layout import KVLayout, KVRegion, array_regions
from kvroom.plan.planner import Planner, check_pages, copies, extents
from kvroom.plan.ranks import Parallel, Place, RankMap, dp_rank_of, match_ranks
from kvroom.plan.tokens import KVGroup, PageTable, TokenSplit

__all__ = [
    "Blocks",
    "Extents",
    "KVGroup",
    "KVLayout",
    "KVRegion",
    "MemoryRange",
    "PageTable",
    "Parallel",
    "Part",
    "Place",
    "Planner",
    "RankMap",
    "Strip",
    "TokenSplit",
    "array_regions",
    "check_pages",
    "copies",
    "dp_rank_of",
    "extents",
    "match_ranks",
    "shares",
    "strips",
]
