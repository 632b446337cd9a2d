"""Visit every state that managers can reach together over wires that drop, repeat, reorder and delay messages.

A world consists of some managers (ranks of a prefill side, decode workers), the messages and transfers in flight
between them, and what engines, links and processes may still do: open, abort and clear at every point, run into every
deadline, lose links, die and start again. `explore` searches the worlds breadth first, so it reports a broken law with
its shortest trace. In every state it checks that

- the table's indexes and counters agree with its rooms, and nothing of a removed room remains (laws 1 and 2);
- a message from a lost peer, or about another generation, changes nothing, and a number is not open twice (law 3);
- phases went forward, and terminal ones stay (law 4);
- no page is released while a transfer may still write or read it, and no page is released twice (law 6);
- if no peer sends anything from here on, every room still ends (law 7);
- success means that every token of every rank has landed, and that checksums, if requested, are equal (law 8);
- a failed room gives a cause, and a room that received its cause from a peer repeats it word by word (law 11);
- if nothing fails from here on, everything can be cleared, the pages of each room come back once, and the audit is
  empty (law 2).

The worlds of `deaths` are about the proof that a source on another machine has ended: in every state the sink keeps its
pages while that source, or a transfer that it has started, may still write them, and each true proof releases them.

`python -m kvroom_lab.explore --all` prints the number of states of each world.
"""

from .managers import LawBroken
from .scopes import LARGER, SCOPES, Deaths, Machines, Scope
from .search import Explored, Found, explore

__all__ = ["LARGER", "SCOPES", "Deaths", "Explored", "Found", "LawBroken", "Machines", "Scope", "explore"]
