"""What a hostile client can send: it gets a reason, or nothing, and the server goes on for the others."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress

import pytest
from PIL import Image

from tests.serving.conftest import EDITS, GENERATIONS, Running, running

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


#: Of a request for an image, less its length and the empty line.
HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def edits(editing) -> Iterator[Running]:
    with running(editing) as made:
        yield made


@pytest.fixture(scope="module")
def impatient(drawing) -> Iterator[Running]:
    with running(drawing, head_seconds=0.5, body_seconds=0.5) as made:
        yield made


@pytest.fixture(autouse=True)
def alive(request) -> Iterator[None]:
    """After each of these tests the server still draws."""
    yield
    for name in ("served", "impatient"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).draw(seed=1).status_code == 200


def told(answer) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error["message"]


BODIES = {
    "empty": (b"", "the body: not JSON"),
    "cut": (b'{"prompt": "a', "the body: not JSON"),
    "a list": (b"[]", "the body: Input should be"),
    "a number": (b"7", "the body: Input should be"),
    "deep": (b"[" * 100_000, "nested deeper than 8 levels"),
    "two keys": (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' appears twice"),
    "NaN": (b'{"prompt": "a", "n": NaN}', "NaN is not JSON"),
    "infinity": (b'{"prompt": "a", "n": 1e999}', "out of range"),
    "no UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "half a character": (b'{"prompt": "\\ud800"}', "prompt: "),
    "no prompt": (b"{}", "prompt: Field required"),
    "a list of prompts": (b'{"prompt": ["a"]}', "prompt: Input should be a valid string"),
    "a long prompt": (json.dumps({"prompt": "x" * 4_001}).encode(), "prompt: String should have at most 4000"),
    "no images": (b'{"prompt": "a", "n": 0}', "n: "),
    "many images": (b'{"prompt": "a", "n": 1000000000}', "n: Input should be less than or equal to 8"),
    "n is text": (b'{"prompt": "a", "n": "1"}', "n: Input should be a valid integer"),
    "half an image": (b'{"prompt": "a", "n": 1.5}', "n: Input should be a valid integer"),
    "n is true": (b'{"prompt": "a", "n": true}', "n: Input should be a valid integer"),
    "a negative seed": (b'{"prompt": "a", "seed": -1}', "seed: "),
    "a huge seed": (b'{"prompt": "a", "seed": 1' + b"0" * 40 + b"}", "seed: "),
    "a seed of a thousand digits": (b'{"prompt": "a", "seed": 1' + b"0" * 5_000 + b"}", "the body"),
    "no variant's size": (b'{"prompt": "a", "size": "1024x1024"}', "size: Input should be 'auto' or '32x32'"),
    "a size of words": (b'{"prompt": "a", "size": "../../etc"}', "size: "),
    "no variant's steps": (b'{"prompt": "a", "num_inference_steps": 1000000}', "num_inference_steps: "),
    "an unknown field": (b'{"prompt": "a", "callback": "x"}', "callback: Extra inputs are not permitted"),
    "controls in a field": (b'{"prompt": "a", "\\u001b[31m": 1}', "\\x1b[31m: Extra inputs"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_body_gets_400_and_a_reason(name, served):
    data, words = BODIES[name]
    answer = served.client.post(GENERATIONS, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert words in told(answer)


def test_a_prompt_of_a_megabyte_is_too_large(served):
    answer = served.draw("x" * 1_000_000)
    assert answer.status_code == 413
    assert "262,144 bytes" in told(answer)


def test_a_client_that_still_sends_gets_its_refusal(served):
    with connect(served) as made:
        made.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 100_000)
        time.sleep(0.3)  # by now it is refused; a connection that was closed would be reset by what follows
        made.sendall(b" " * 900_000)
        assert read_all(made).startswith(b"HTTP/1.1 413")


EARLY = {
    "another type": ("POST", GENERATIONS, "text/plain", 415),
    "no such path": ("POST", "/v2", "", 404),
    "no such method": ("DELETE", GENERATIONS, "", 405),
    "a page that reads no body": ("GET", "/health", "", 200),
    "a page of another site": ("POST", GENERATIONS, "application/json", 403),
}


@pytest.mark.parametrize("name", EARLY)
def test_an_answer_that_does_not_wait_for_its_body_ends_after_it(name, served):
    """A connection that is closed on bytes that nobody has read is reset, and the client may lose the answer."""
    method, path, kind, status = EARLY[name]
    came = []

    async def receive():
        came.append("body")
        return {"type": "http.request", "body": b"late", "more_body": came.count("body") < 3}

    async def send(message):
        came.append(message.get("status") or ("part" if message.get("more_body") else "end"))

    rows = {"host": "x", "content-length": "12", "content-type": kind}
    if status == 403:
        rows["sec-fetch-site"] = "cross-site"
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(key.encode(), value.encode()) for key, value in rows.items()]}
    asyncio.run(served.server.application.asgi()(scope, receive, send))
    assert came == [status, "part", "body", "body", "body", "end"]


def test_a_body_without_a_length_is_counted(served):
    with connect(served) as made:
        made.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):  # the connection is closed while we write
            for _ in range(10_000):
                made.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        assert read_all(made)[:12] in (b"HTTP/1.1 413", b"")


def test_a_body_of_another_type_is_refused(served):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = served.client.post(GENERATIONS, content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status_code == 415
        assert "send application/json" in told(answer)


def test_paths_and_methods_that_are_not_there(served):
    for path in ("/v2", "/v1/images/edits", "/../../etc/passwd", "/%00", "/v1/models/x"):
        answer = served.client.get(path)
        assert answer.status_code == 404
        assert "There is /v1/images/generations" in told(answer)
    answer = served.client.delete(GENERATIONS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# -- connections --


def connect(served: Running) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read_all(made: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionError):
        while data := made.recv(65_536):
            found += data
    return found


def trickle(made: socket.socket, data: bytes, seconds: float) -> None:
    """Sends a byte now and then until the server has enough of it."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for byte in data:
            try:
                made.send(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)
    raise AssertionError("the server still reads")


@pytest.mark.parametrize("data", [b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: bbbbbbbbbbb", b"\r\n", b"G"], ids=repr)
def test_a_head_that_trickles_in_ends_the_connection(impatient, data):
    with connect(impatient) as made:
        trickle(made, data, 10)


def test_a_connection_that_says_nothing_is_closed(impatient):
    with connect(impatient) as made:
        assert read_all(made) == b""


def test_the_second_head_of_a_connection_has_no_more_time(impatient):
    with connect(impatient) as made:
        made.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert made.recv(65_536).startswith(b"HTTP/1.1 200")
        trickle(made, b"\r\n", 10)


def test_a_hundred_slow_clients_keep_nobody_from_drawing(impatient):
    slow = [connect(impatient) for _ in range(100)]
    for made in slow:
        made.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Le")
    assert impatient.draw(seed=1).status_code == 200
    for made in slow:
        assert b"408" in read_all(made)
        made.close()


def test_a_body_that_does_not_come_gets_408(impatient):
    with connect(impatient) as made:
        made.sendall(HEAD + b'Content-Length: 90\r\n\r\n{"prompt"')
        answer = read_all(made)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body did not come within 0.5 seconds" in answer


def test_a_head_without_end_gets_431(served):
    with connect(served) as made:
        made.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with suppress(OSError):
            for number in range(10_000):
                made.sendall(b"X-%d: %s\r\n" % (number, b"a" * 100))
        assert read_all(made)[:12] in (b"HTTP/1.1 431", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
    ids=repr,
)
def test_what_is_no_http_ends_the_connection(impatient, data):
    with connect(impatient) as made:
        made.sendall(data)
        read_all(made)


def test_connections_beyond_the_limit_get_503(drawing):
    with running(drawing, connections=8) as served:
        held = [connect(served) for _ in range(12)]
        ends = time.monotonic() + 10
        while served.client.get("/health").status_code != 503:
            assert time.monotonic() < ends
        for made in held:
            made.close()
        ends = time.monotonic() + 10
        while served.client.get("/health").status_code != 200:
            assert time.monotonic() < ends
            time.sleep(0.05)


def test_bodies_together_are_bounded(drawing):
    with running(drawing, bodies_bytes=200_000) as served:
        with connect(served) as first, connect(served) as second:
            for made in (first, second):
                made.sendall(HEAD + b"Content-Length: 150000\r\n\r\n" + b" " * 140_000)
            assert read_all(second).startswith(b"HTTP/1.1 503")
        assert served.draw(seed=1).status_code == 200


# -- images --


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: int | None = None, extra: bytes = b"") -> bytes:
    """A grey PNG that says this size; its rows are zeros, which deflate packs a thousandfold."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = zlib.compress(b"\0" * (width + 1) * (height if rows is None else rows), 9)
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


IMAGES = {
    "a bomb that is whole": png(12_000, 12_000),
    "a bomb by its head": png(2_000_000_000, 2_000_000_000, 0),
    "just too large": png(2049, 2048, 0),
    "a bomb of text": png(8, 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 80_000_000, 9))),
    "cut": png(500, 500)[:60],
    "without rows": png(64, 64, 0),
    "no bytes": b"",
    "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a GIF": saved("GIF"),
    "a TIFF": saved("TIFF"),
    "an EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "of more than eight bits": saved("PNG", "I;16"),
    "of no size": png(0, 0, 0),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_is_none_or_a_bomb_gets_400(name, edits):
    started = time.monotonic()
    answer = edits.client.post(EDITS, data={"prompt": "a nine"}, files={"image": ("a.png", IMAGES[name])})
    if name == "a bomb of text":  # whose text is not unpacked at all
        assert answer.status_code in (200, 400)
    else:
        assert answer.status_code == 400
        assert told(answer).startswith("image: ")
    assert time.monotonic() - started < 10


def test_an_image_of_the_largest_size_is_taken(edits):
    answer = edits.client.post(EDITS, data={"prompt": "a nine"}, files={"image": ("a.png", png(2048, 2048))})
    assert answer.status_code == 200


def test_forms_that_are_wrong(edits):
    image = ("a.png", saved("PNG"))
    many = [("image", image)] * 17
    fields = {f"f{number}": "x" for number in range(40)}
    cases = [
        ({"data": {"prompt": "a"}, "files": many}, "Too many files"),
        ({"data": fields, "files": {"image": image}}, "Too many fields"),
        ({"data": {"prompt": "a", "n": "x"}, "files": {"image": image}}, "n: Input should be a valid integer"),
        ({"data": {"prompt": ["a", "b"]}, "files": {"image": image}}, "prompt: it is given twice"),
        ({"data": {"prompt": "x" * 300_000}, "files": {"image": image}}, "maximum size"),
        ({"data": {"prompt": "a", "image": "text"}, "files": {"other": image}}, "image: "),
        ({"data": {"prompt": "a"}, "files": {"image": image, "other": image}}, "other: edits takes 0 images here"),
        ({"data": {"prompt": "a"}, "files": [("image", image), ("image", image)]}, "image: edits takes 1 image here"),
    ]
    for given, words in cases:
        answer = edits.client.post(EDITS, **given)
        assert answer.status_code == 400
        assert words in told(answer)
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x"):
        answer = edits.client.post(EDITS, content=b"--x\r\nnonsense", headers={"content-type": kind})
        assert answer.status_code == 400
        assert told(answer)


def test_an_upload_that_is_too_large(edits):
    answer = edits.client.post(EDITS, data={"prompt": "a"}, files={"image": ("a.png", b"\0" * (21 << 20))})
    assert answer.status_code == 413
