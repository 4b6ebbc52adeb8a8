"""Remembered blocks mean what they meant: both ends against the plain library, in any order."""

from __future__ import annotations

import pytest
from hpack.exceptions import OversizedHeaderListError
from hpack.hpack import Decoder, Encoder
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from mm.core.headers import HeaderList
from mm.edge.h2.compression import LimitedDecoder, RememberingEncoder

# Few and partly long, so that lists repeat and a small table overflows.
_names = st.sampled_from([b":path", b"x-a", b"x-b", b"x-long"])
_values = st.sampled_from([b"", b"1", b"2", b"v" * 60, b"w" * 90])
_header = st.builds(HeaderTuple, _names, _values) | st.tuples(_names, _values)
_sensitive = st.builds(NeverIndexedHeaderTuple, _names, _values)
_lists = st.lists(_header | _sensitive, max_size=4)
_sizes = st.sampled_from([0, 64, 200, 4096])
_steps = st.lists(_lists | _sizes, max_size=30)


@given(_steps)
def test_what_is_encoded_is_what_the_library_encodes(steps: list[HeaderList | int]) -> None:
    encoder, plain, reader = RememberingEncoder(), Encoder(), Decoder()
    for step in steps:
        if isinstance(step, int):
            if step != plain.header_table_size:
                plain.header_table_size = step
            encoder.header_table_size = step
            continue
        block = encoder.encode_list(step)
        assert block == plain.encode(step, huffman=False)
        read = list(reader.decode(block, raw=True))
        assert [tuple(header) for header in read] == [tuple(header) for header in step]


@given(_steps)
def test_what_is_read_is_what_the_library_reads(steps: list[HeaderList | int]) -> None:
    encoder, decoder, plain = Encoder(), LimitedDecoder(4096), Decoder()
    for step in steps:
        if isinstance(step, int):
            if step != encoder.header_table_size:
                encoder.header_table_size = step
            continue
        block = encoder.encode(step)
        read = list(decoder.decode(block, raw=True))
        expected = list(plain.decode(block, raw=True))
        assert read == expected
        assert [type(header) for header in read] == [type(header) for header in expected]
        read.clear()  # The list is the caller's own.


def test_blocks_are_remembered_while_the_table_stays() -> None:
    encoder, decoder = RememberingEncoder(), LimitedDecoder(4096)
    common: HeaderList = [(b":path", b"/a"), (b"x", b"1")]
    blocks = [encoder.encode_list(common) for _ in range(3)]
    assert blocks[1] == blocks[2] != blocks[0]
    assert encoder._remembered == {tuple(common): blocks[1]}
    for block in blocks:
        assert list(decoder.decode(block, raw=True)) == common
    assert list(decoder._remembered) == [blocks[1]]
    # Something new changes what every reference means.
    assert list(decoder.decode(encoder.encode_list([(b"new", b"1")]), raw=True))
    assert not encoder._remembered
    assert not decoder._remembered
    assert list(decoder.decode(encoder.encode_list(common), raw=True)) == common


def test_memory_and_expansion_are_bounded() -> None:
    encoder, decoder = RememberingEncoder(), LimitedDecoder(1000)
    for number in range(200):
        volatile = NeverIndexedHeaderTuple(b"n", b"%d" % number)
        list(decoder.decode(encoder.encode_list([volatile]), raw=True))
    assert len(decoder._remembered) <= 64
    assert len(encoder._remembered) <= 64
    decoder.max_header_list_size = 10**9
    with pytest.raises(OversizedHeaderListError):
        decoder.decode(Encoder().encode([(b"x", b"v" * 1000)]))
