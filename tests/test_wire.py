"""Both framings, from plain bytes: what they make, what they take, and what they refuse."""

import json
import random
import struct

import pytest
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)

from sorna_jupyter.exceptions import InvalidRequest
from sorna_jupyter.wire import (
    LEGACY,
    V1,
    V1_PROTOCOL,
    Header,
    MalformedFrame,
    framing_of,
    read_header,
)

HEADER = b'{"msg_id":"m1","msg_type":"execute_request","session":"s1","username":"",\
"date":"2026-01-01T00:00:00.000000Z","version":"5.4"}'
CONTENT = '{"code":"print(\'é 中 \U0001f40d\')","n":1.0, "big":12345678901234567890}'.encode()
PARTS = [HEADER, b"{}", b'{"a":[1,2]}', CONTENT]
BUFFERS = [b"\x00\x01\xff", b"", b"x" * 1000]

MESSAGES = [
    pytest.param(PARTS, id="no buffers"),
    pytest.param([*PARTS, b""], id="one empty buffer"),
    pytest.param([*PARTS, *BUFFERS], id="buffers"),
    pytest.param([HEADER, b"{}", b"{}", b"{}"], id="empty content"),
    pytest.param([HEADER, HEADER, b"{}", b'{"t":"' + b"y" * 3_000_000 + b'"}'], id="megabytes"),
]


@pytest.fixture(params=[V1, LEGACY], ids=["v1", "legacy"])
def framing(request):
    return request.param


def test_the_framing_is_the_one_that_the_handshake_agreed_on():
    assert framing_of(V1_PROTOCOL) is V1
    assert framing_of(None) is LEGACY
    assert framing_of("something else") is LEGACY


@pytest.mark.parametrize("channel", ["shell", "iopub", "control", "stdin"])
@pytest.mark.parametrize("parts", MESSAGES)
def test_a_message_comes_back_byte_for_byte(framing, parts, channel):
    assert framing.decode(framing.encode(channel, parts)) == (channel, parts)


# -- the same bytes as jupyter_server's ------------------------------------------------------


@pytest.mark.parametrize("parts", MESSAGES)
def test_jupyterlab_gets_the_v1_frames_that_jupyter_server_makes(parts):
    assert V1.encode("iopub", parts) == serialize_msg_to_ws_v1(parts, "iopub")
    assert deserialize_msg_from_ws_v1(V1.encode("shell", parts)) == ("shell", parts)


def test_thebe_gets_a_legacy_text_frame_that_jupyter_server_could_have_made():
    frame = LEGACY.encode("iopub", PARTS)

    assert isinstance(frame, str)
    assert json.loads(frame) == {
        "channel": "iopub",
        "header": json.loads(HEADER),
        "parent_header": {},
        "metadata": {"a": [1, 2]},
        "content": json.loads(CONTENT),
        "buffers": [],
        "msg_id": "m1",
        "msg_type": "execute_request",
    }


def test_ipywidgets_gets_a_legacy_binary_frame_that_jupyter_server_could_have_made():
    message = deserialize_binary_message(LEGACY.encode("iopub", [*PARTS, *BUFFERS]))

    assert message["buffers"] == BUFFERS
    assert message["content"] == json.loads(CONTENT)
    assert (message["channel"], message["msg_type"]) == ("iopub", "execute_request")


def test_what_jupyter_server_sends_in_legacy_binary_is_read():
    message = {
        "channel": "control",
        "header": json.loads(HEADER),
        "parent_header": {},
        "metadata": {},
        "content": {"x": 1},
        "buffers": BUFFERS,
    }

    channel, parts = LEGACY.decode(serialize_binary_message(message))

    assert channel == "control"
    assert [json.loads(part) for part in parts[:4]] == [json.loads(HEADER), {}, {}, {"x": 1}]
    assert parts[4:] == BUFFERS


# -- legacy's liberties ----------------------------------------------------------------------


def test_a_legacy_message_without_a_channel_is_for_shell():
    assert LEGACY.decode('{"header":{"msg_id":"a"}}')[0] == "shell"
    assert LEGACY.decode('{"header":{"msg_id":"a"},"channel":null}')[0] == "shell"


def test_what_a_legacy_message_leaves_out_or_nulls_is_an_empty_object():
    text = '{"header":{"a":1},"content":null,"parent_header":null,"buffers":[],"msg_id":"x"}'

    assert LEGACY.decode(text) == ("shell", [b'{"a":1}', b"{}", b"{}", b"{}"])


def test_contents_are_not_re_encoded():
    content = '{ "a" : 1e3,"b":"\\u00e9é","c":[ ] }'
    text = f'{{"header":{{}},"content":{content},"channel":"shell"}}'

    assert LEGACY.decode(text)[1][3] == content.encode()


def test_half_a_character_in_a_cell_reaches_the_kernel():
    """Browsers write it as an escape when someone cuts an emoji in two."""
    text = '{"header":{"msg_id":"a"},"content":{"code":"\\ud83d"},"channel":"control"}'

    channel, parts = LEGACY.decode(text)

    assert channel == "control"
    assert json.loads(parts[3]) == {"code": "\ud83d"}


def test_bytes_that_are_no_utf8_do_not_close_the_browsers_socket():
    """A kernel that prints a lone surrogate writes such bytes."""
    frame = LEGACY.encode("iopub", [HEADER, b"{}", b"{}", b'{"text":"\xed\xa0\x80"}'])

    assert json.loads(frame)["content"]["text"].startswith("�")


# -- hostile frames --------------------------------------------------------------------------


def v1_frame(*offsets, body=b"", count=None):
    count = len(offsets) if count is None else count
    return struct.pack(f"<{len(offsets) + 1}Q", count, *offsets) + body


GOOD = V1.encode("shell", PARTS)

HOSTILE_V1 = {
    "nothing": b"",
    "short": b"\x01",
    "no offsets": v1_frame(),
    "one offset": v1_frame(16),
    "more offsets than bytes": v1_frame(count=2**64 - 1),
    "many offsets": v1_frame(count=2**40),
    "offset beyond the end": v1_frame(64, 69, 70, 71, 72, 73, 2**63, body=b"shell{}{}"),
    "offsets that descend": v1_frame(64, 69, 66, 70, 71, 72, 73, body=b"shell" + b"{}" * 10),
    "offsets into the offsets": v1_frame(0, 8, 16, 24, 32, 40, body=b"x" * 8),
    "too few parts": v1_frame(40, 45, 47, 47, body=b"shell{}"),
    "channel that is no text": GOOD.replace(b"shell", b"\xff\xfe\xfd\xfc\xfb"),
    "cut off": GOOD[:-10],
}


@pytest.mark.parametrize("frame", HOSTILE_V1.values(), ids=HOSTILE_V1.keys())
def test_a_hostile_v1_frame_is_refused(frame):
    with pytest.raises(MalformedFrame) as refusal:
        V1.decode(frame)

    assert refusal.value.close_code == 1007


def test_v1_has_no_text_frames():
    with pytest.raises(MalformedFrame) as refusal:
        V1.decode('{"header":{}}')

    assert refusal.value.close_code == 1003


def legacy_frame(*offsets, body=b"", count=None):
    count = len(offsets) if count is None else count
    return struct.pack(f"!{len(offsets) + 1}I", count, *offsets) + body


HOSTILE_LEGACY = {
    "nothing": "",
    "no JSON": "hello",
    "a number": "1",
    "a list": "[]",
    "cut off": '{"header":{"a":',
    "no header": '{"content":{}}',
    "header that is text": '{"header":"x"}',
    "header that is null": '{"header":[]}',
    "content that is a list": '{"header":{},"content":[1]}',
    "channel that is a number": '{"header":{},"channel":1}',
    "two documents": '{"header":{}}{"header":{}}',
    "deeply nested": '{"header":' + "[" * 100_000,
    "lone surrogate in a list": '["\\ud800"]',
    "lone surrogate without a header": '{"content":{"code":"\\ud800"}}',
    "lone surrogate, channel that is a list": '{"header":{"a":"\\ud800"},"channel":[]}',
    "escape that is none": '{"header":{"a":"\\q"}}',
    "empty binary": b"",
    "short binary": b"\0\0",
    "no offsets": legacy_frame(),
    "more offsets than bytes": legacy_frame(count=2**32 - 1),
    "offset beyond the end": legacy_frame(8, 2**31, body=b'{"header":{}}'),
    "offsets that descend": legacy_frame(20, 16, body=b"x" * 30),
    "offsets into the offsets": legacy_frame(0, body=b'{"header":{}}'),
    "binary with JSON that is no UTF-8": legacy_frame(8, body=b'{"header":{"a":"\xff"}}'),
}


@pytest.mark.parametrize("frame", HOSTILE_LEGACY.values(), ids=HOSTILE_LEGACY.keys())
def test_a_hostile_legacy_frame_is_refused(frame):
    with pytest.raises(MalformedFrame):
        LEGACY.decode(frame)


def test_noise_is_refused_and_raises_nothing_else(framing):
    noise = random.Random(1)
    seeds = [framing.encode("shell", [*PARTS, *BUFFERS[:2]]), bytes(200)]
    for _ in range(5000):
        frame = noise.choice(seeds)
        if isinstance(frame, str):
            frame = frame.encode()
        frame = bytearray(frame)
        for _ in range(noise.randint(1, 6)):
            frame[noise.randrange(min(len(frame), 120))] = noise.randrange(256)
        try:
            channel, parts = framing.decode(bytes(frame[: noise.randint(0, len(frame))]))
        except MalformedFrame:
            continue
        assert isinstance(channel, str) and len(parts) >= 4


def test_a_malformed_frame_is_both_a_value_error_and_an_invalid_request():
    assert issubclass(MalformedFrame, ValueError)
    assert issubclass(MalformedFrame, InvalidRequest)


# -- headers ---------------------------------------------------------------------------------

DEEP_HEADER = b'{"msg_id":"a","msg_type":"b","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def test_a_header_is_read_as_far_as_routing_needs():
    assert read_header(HEADER) == Header("m1", "execute_request", "s1")
    assert read_header(b'{"msg_id":"a","msg_type":"b","subshell_id":"c"}').subshell_id == "c"


@pytest.mark.parametrize(
    "header", [b"", b"{}", b"[]", b'{"msg_id":1,"msg_type":"a"}', b"\xff{", DEEP_HEADER]
)
def test_a_header_that_names_nothing_is_refused(header):
    with pytest.raises(MalformedFrame):
        read_header(header)


@pytest.mark.parametrize("header", [b"", b"{}", b'{"msg_id":"a"}', b'{"msg_id":"a","msg_type":"b"'])
def test_a_kernels_broken_header_is_no_legacy_frame(header):
    with pytest.raises(MalformedFrame):
        LEGACY.encode("iopub", [header, b"{}", b"{}", b"{}"])


def test_v1_carries_what_it_cannot_read():
    parts = [b"\xff", b"", b"[", b"null"]

    assert V1.decode(V1.encode("iopub", parts)) == ("iopub", parts)
