"""Plans: from two layouts and two page lists to the blocks to copy. Pure NumPy, no I/O."""

from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.plan.copies import Planner, check_cover, check_pages, copies, extents
from kvroom.plan.layout import KVLayout, KVRegion, array_regions
from kvroom.plan.strips import Strip, strips

__all__ = [
    "Blocks",
    "Extents",
    "KVLayout",
    "KVRegion",
    "MemoryRange",
    "Planner",
    "Strip",
    "array_regions",
    "check_cover",
    "check_pages",
    "copies",
    "extents",
    "strips",
]
