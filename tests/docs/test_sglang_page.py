"""docs/sglang.md names exactly the settings and the refusals that the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec

from kvroom.adapters.sglang.plugin import TESTED
from kvroom.adapters.sglang.settings import PREFIX, SGLangSettings
from kvroom.adapters.sglang.support import REFUSALS
from kvroom.runtime.machine_id import MACHINE_ID_VARIABLE
from kvroom.wire.auth import SECRET_FILE_VARIABLE, SECRET_VARIABLE

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sglang.md").read_text()
SIDES = {("prefill", "decode"): "both", ("decode",): "decode", ("prefill",): "prefill"}
OF_ANOTHER_SETTING = {
    "KVROOM_HOST": "SGLang's `--host`",
    "KVROOM_ADVERTISE_HOST": "`KVROOM_HOST`",
    "KVROOM_BOOTSTRAP_ALLOW": "loopback addresses and this server's own host",
    "KVROOM_RENEW_S": "`KVROOM_BOOTSTRAP_S` / 6",
}


def rows(section: str, first: str) -> list[list[str]]:
    """Return the cells of the rows of a section whose first cell matches `first`."""
    _, _, rest = PAGE.partition(f"\n## {section}\n")
    assert rest, f"there is no section {section!r}"
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if re.match(first, row[0])]


def default(name: str, value: object) -> str:
    if value is None:
        return OF_ANOTHER_SETTING[name]
    return f"`{value if isinstance(value, str) else json.dumps(value).removesuffix('.0')}`"


def test_the_table_of_settings_is_that_of_the_code() -> None:
    code = {
        f"{PREFIX}{field.name.upper()}": default(f"{PREFIX}{field.name.upper()}", getattr(SGLangSettings(), field.name))
        for field in msgspec.structs.fields(SGLangSettings)
    }
    code |= {SECRET_VARIABLE: "", SECRET_FILE_VARIABLE: "", MACHINE_ID_VARIABLE: ""}
    page = rows("Settings", f"`{PREFIX}")
    assert {row[0].strip("`"): row[1] for row in page} == code
    assert len(page) == len(code), "a setting has two rows"


def test_the_table_of_refused_options_is_that_of_the_code() -> None:
    page = rows("Not supported yet", "`--")
    assert [(row[0].split("`")[1], row[1], row[2]) for row in page] == [
        (refusal.flag, SIDES[refusal.modes], refusal.reason) for refusal in REFUSALS
    ]


def test_numbers_that_are_refused_are_named_as_such() -> None:
    said = {row[0].split("`")[1]: row[0].partition("` ")[2] for row in rows("Not supported yet", "`--")}
    for refusal in REFUSALS:
        above, below, on = (refusal.is_used(value) for value in (2, 0.5, True))
        words = "" if on else "above 1" if above else "below 1" if below else "?"
        assert said[refusal.flag] == words, refusal.flag


def test_the_page_names_the_versions_that_were_tested() -> None:
    assert f"**SGLang {', '.join(TESTED)}**" in PAGE
