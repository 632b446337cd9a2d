"""The options of transports: one struct defines their names, their accepted values and their documentation."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any, ClassVar

import msgspec
import pytest
from msgspec import Meta

from kvroom.errors import ConfigurationError
from kvroom.transports import REGISTRY, Transport, TransportOptions, create, options_of
from kvroom.transports.kit.options import ListeningOptions, Option, listed
from kvroom.transports.local import LocalOptions, LocalTransport
from kvroom.transports.memory import MemoryTransport
from kvroom.transports.onesided.options import OneSidedOptions
from kvroom.transports.selection.options import by_option, in_words, without
from kvroom.transports.tcp import TcpOptions, TcpTransport


class ToldOptions(ListeningOptions, frozen=True, kw_only=True):
    word: Annotated[str, Meta(description="what it was told")] = ""
    count: Annotated[int, Meta(ge=1, description="how often")] = 3


class Told(MemoryTransport):
    """A transport of another project."""

    options: ClassVar[type[TransportOptions]] = ToldOptions

    def __init__(self, told: ToldOptions) -> None:
        super().__init__()
        self.told = told


class Crooked(MemoryTransport):
    options: ClassVar[Any] = {"word": ""}


def make_memory() -> Transport:
    return MemoryTransport()


@pytest.mark.parametrize("name", REGISTRY)
def test_each_option_has_a_default_that_it_takes_and_says_what_it_is(name: str) -> None:
    kind = options_of(name)
    assert kind().checked(name) == kind()
    assert all(option.description for option in listed(kind))
    assert not {"host", "advertise"} & {option.name for option in listed(kind)}


@pytest.mark.parametrize("name", REGISTRY)
def test_an_unknown_option_is_one_error_that_names_those_there_are(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^transport {name}: unknown option 'colour'; it") as raised:
        create(name, colour="red")
    assert all(option.name in str(raised.value) for option in listed(options_of(name)))


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("tcp", {"port": 65536}, "port=65536: Expected `int` <= 65535; its options are port"),
        ("tcp", {"port": "9"}, "port='9': Expected `int`, got `str`"),
        ("tcp", {"max_connections": 0}, "max_connections=0: Expected `int` >= 1"),
        ("tcp", {"handshake_s": 0}, "handshake_s=0: Expected `float` > 0"),
        ("tcp", {"handshake_s": 1e9}, "handshake_s=1000000000.0: Expected `float` <= 86400"),
        ("tcp", {"introduction_s": -1}, "introduction_s=-1: Expected `float` >= 0"),
        ("local", {"mode": "fast"}, "mode='fast': Invalid enum value 'fast'; its options are mode (auto), threads (2)"),
        ("local", {"threads": 0}, "threads=0: Expected `int` >= 1"),
        ("auto", {"threads": 1.5}, "threads=1.5: Expected `int`, got `float`"),
        ("nixl", {"parameters": {"num_threads": 2}}, "parameters={'num_threads': 2}: Expected `str`, got `int`"),
        ("nixl", {"parameters": ["a"]}, "parameters=['a']: Expected `object`, got `array`"),
        ("mooncake", {"stall_s": 0}, "stall_s=0: Expected `int` >= 1"),
        ("mooncake", {"packing": "sometimes"}, "packing='sometimes': Invalid enum value 'sometimes'"),
        ("ascend", {"device_id": -1}, "device_id=-1: Expected `int` >= 0"),
        ("mori", {"trusted_fabric": "yes"}, "trusted_fabric='yes': Expected `bool`, got `str`"),
    ],
)
def test_a_wrong_value_is_one_error_that_names_it(name: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        create(name, **given)
    assert str(raised.value).startswith(f"transport {name}: {says}")


def test_options_that_were_made_by_hand_are_checked_too() -> None:
    with pytest.raises(ConfigurationError, match="transport tcp: port=-1: Expected `int` >= 0"):
        TcpTransport(TcpOptions(port=-1))
    with pytest.raises(ConfigurationError, match="transport local: threads=0"):
        LocalTransport(LocalOptions(threads=0))


@pytest.mark.parametrize(("nbytes", "fits"), [(0, True), (1, False), (65535, False), (65536, True)])
def test_a_staging_area_has_room_for_its_slots_or_there_is_none(nbytes: int, fits: bool) -> None:
    options = OneSidedOptions(staging_bytes=nbytes)
    if fits:
        assert options.checked("some") == options
        return
    with pytest.raises(ConfigurationError, match=f"staging_bytes={nbytes}: choose 0, or at least 65536"):
        options.checked("some")
    assert msgspec.structs.replace(options, packing="never").checked("some")


def test_a_transport_of_somebody_else_gets_its_options_and_where_it_listens() -> None:
    made = create(f"{__name__}:Told", host="10.0.0.1", advertise="10.0.0.2", trusted_fabric=True, word="hello")
    assert isinstance(made, Told)
    with closing(made):
        assert made.told == ToldOptions(host="10.0.0.1", advertise="10.0.0.2", word="hello", count=3)
    with pytest.raises(ConfigurationError, match=r"count=0: Expected `int` >= 1; its options are word, count \(3\)$"):
        create(f"{__name__}:Told", count=0)


def test_what_declares_no_options_is_made_with_nothing_and_takes_none() -> None:
    with closing(create(f"{__name__}:make_memory", host="10.0.0.1", trusted_fabric=True)) as made:
        assert made.name == "memory"
    with pytest.raises(ConfigurationError, match=r"unknown option 'word'; it has no options$"):
        create(f"{__name__}:make_memory", word="hello")


def test_options_that_are_no_struct_are_an_error_of_the_transport() -> None:
    with pytest.raises(ConfigurationError, match=r"Crooked: its `options` is .*: name a subclass of TransportOptions"):
        create(f"{__name__}:Crooked")


def test_people_read_each_option_once_with_all_that_have_it() -> None:
    found = by_option()
    assert found[Option("port", "0", "of the data connections; 0: any free one")] == ["tcp"]
    assert [names for option, names in found.items() if option.name == "staging_bytes"] == [
        ["nixl", "mooncake", "ascend", "mori"]
    ]
    assert without() == ["memory", "fake"]
    assert "local: mode (auto), threads (2)" in in_words()
    assert not any(f"{name}: " in in_words() for name in without())
