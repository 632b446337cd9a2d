"""Visit every state that managers can reach together over wires that drop, repeat, reorder and delay.

A world is some managers (ranks of a prefill side, decode workers), the messages between them, the transfers under way,
and what engines, links and processes may still do: open, abort and clear at every point, run into every deadline, lose
links, die and start again. `explore` walks it breadth first, so a broken law is reported with its shortest trace.
In every state it checks that

- the table's own books agree, and nothing that is gone remains (laws 1 and 2);
- what is said by a lost peer, or about another generation, changes nothing; a number is not open twice (law 3);
- phases went forward, and terminal ones stay (law 4);
- no page is released while a transfer may still write into it or read from it, and none twice (law 6);
- with everybody else silent from here on, every room still ends (law 7);
- success means that every token of every rank has landed, and that checksums that were asked for agree (law 8);
- a failed room says why, and who was told a cause repeats it word by word (law 11);
- with all well again from here on, everything can be cleared, each room's pages have come back once, and the audit is
  empty (law 2).

The worlds of `deaths` ask for the proof that a source on another machine has ended: in every state the sink keeps its
pages while that source, or what it has begun, may still write them, and each true proof brings them back.

`python -m kvroom.testing.explore --all` prints how much there is to visit.
"""

from .managers import LawBroken
from .scopes import LARGER, SCOPES, Deaths, Machines, Scope
from .search import Explored, Found, explore

__all__ = ["LARGER", "SCOPES", "Deaths", "Explored", "Found", "LawBroken", "Machines", "Scope", "explore"]
