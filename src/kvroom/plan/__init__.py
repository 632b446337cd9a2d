"""Plans: from two layouts and two page lists to the blocks to copy. Pure NumPy, no I/O."""

from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.plan.copies import Planner, check_pages, copies, extents
from kvroom.plan.layout import KVLayout, KVRegion, array_regions
from kvroom.plan.ranks import Feeds, Parallel, Place, dp_rank_of, feeds
from kvroom.plan.shares import shares
from kvroom.plan.sharing import Part
from kvroom.plan.strips import Strip, strips
from kvroom.plan.tokens import KVGroup, PageTable, TokenSplit

__all__ = [
    "Blocks",
    "Extents",
    "Feeds",
    "KVGroup",
    "KVLayout",
    "KVRegion",
    "MemoryRange",
    "PageTable",
    "Parallel",
    "Part",
    "Place",
    "Planner",
    "Strip",
    "TokenSplit",
    "array_regions",
    "check_pages",
    "copies",
    "dp_rank_of",
    "extents",
    "feeds",
    "shares",
    "strips",
]
