"""Plans: compute the blocks to copy from two layouts and two page lists. Pure NumPy, no I/O."""

from .assignment import shares
from .blocks import Blocks, Extents, MemoryRange
from .hash_order import Strip, strips
from .intersection import Part
from .layout import KVLayout, KVRegion, array_regions
from .planner import Planner, check_pages, copies, extents
from .ranks import Parallel, Place, RankMap, dp_rank_of, match_ranks
from .tokens import KVGroup, PageTable, TokenSplit

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
