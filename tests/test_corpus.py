"""Notebook 01's downloads when the network misbehaves: what one notebook cannot show."""
import errno
import hashlib
import http.server
import threading

import pytest

from nanochat_nb import corpus
from nanochat_nb.corpus import HubText, announced, fetch_file
from nanochat_nb.runtime import UserError

DATA = bytes(range(256)) * 4096                                  # 1 MiB


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that redirects to its files, announces their sha256, and has a plan of mishaps."""

    def do_HEAD(self):
        self.send_response(302)
        self.send_header("Location", "/elsewhere")
        self.send_header("X-Linked-Etag", f'"{self.server.sha256}"')
        self.send_header("X-Linked-Size", str(len(DATA)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].rstrip("-"))
        mishap = self.server.mishaps.pop(0) if self.server.mishaps else ""
        self.server.seen.append((start, mishap))
        if mishap in ("503", "404", "416"):
            return self.send_error(int(mishap))
        if mishap == "no range":
            start = 0
        body = DATA[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mishap == "damaged":
            body = body[:1000] + b"x" + body[1001:]
        self.wfile.write(body[:len(body) // 2] if mishap == "stops" else body)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.mishaps, server.seen, server.sha256 = [], [], hashlib.sha256(DATA).hexdigest()
    server.url = f"http://127.0.0.1:{server.server_port}/shard_00000.parquet"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub, path, pause=0.01, **options):
    return fetch_file(hub.url, path, pause=pause, timeout=5, **options)


def test_the_announcement_stands_on_the_redirect(hub):
    assert announced(hub.url) == (hub.sha256, len(DATA))


def test_an_interrupted_transfer_goes_on_where_it_stopped(hub, tmp_path):
    hub.mishaps = ["stops", "503", "stops"]
    assert fetch(hub, tmp_path / "a").read_bytes() == DATA
    starts = [start for start, _ in hub.seen]
    half = len(DATA) // 2
    assert starts == [0, half, half, half + half // 2]
    fetch(hub, tmp_path / "a")
    assert len(hub.seen) == 4                                     # already there: not asked for again


def test_a_later_call_resumes_what_an_earlier_one_left(hub, tmp_path):
    hub.mishaps = ["stops", "503"]
    with pytest.raises(UserError, match="run again to go on"):
        fetch(hub, tmp_path / "a", attempts=2)
    assert not (tmp_path / "a").exists()
    assert fetch(hub, tmp_path / "a").read_bytes() == DATA and hub.seen[-1][0] == len(DATA) // 2


def test_a_server_without_ranges_starts_over(hub, tmp_path):
    hub.mishaps = ["stops", "no range"]
    assert fetch(hub, tmp_path / "a").read_bytes() == DATA


def test_damaged_bytes_are_thrown_away_and_fetched_again(hub, tmp_path):
    hub.mishaps = ["damaged"]
    assert fetch(hub, tmp_path / "a").read_bytes() == DATA
    assert [start for start, _ in hub.seen] == [0, 0]


def test_a_file_that_never_matches_its_checksum_is_refused(hub, tmp_path):
    hub.sha256 = "0" * 64
    with pytest.raises(UserError, match="sha256"):
        fetch(hub, tmp_path / "a", attempts=3)
    assert not (tmp_path / "a").exists() and len(hub.seen) == 3


def test_a_part_that_is_too_long_is_dropped(hub, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA + b"more")
    hub.mishaps = ["416"]
    assert fetch(hub, tmp_path / "a").read_bytes() == DATA


def test_what_does_not_exist_is_not_tried_again(hub, tmp_path):
    hub.mishaps = ["404"]
    with pytest.raises(UserError, match="404"):
        fetch(hub, tmp_path / "a")
    assert len(hub.seen) == 1


def test_a_full_disk_is_said_at_once(hub, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(corpus, "_fetch_once", full)
    with pytest.raises(UserError, match="No space left"):
        fetch(hub, tmp_path / "a", pause=100)


def test_two_readers_share_one_download(hub, tmp_path):
    threads = [threading.Thread(target=fetch, args=(hub, tmp_path / "a")) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (tmp_path / "a").read_bytes() == DATA and len(hub.seen) == 1


def test_a_shard_that_fails_in_the_background_is_reported_to_its_reader(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.rsplit("/", 1)[0])
    hub.mishaps = ["404"] * 9
    source = HubText("fineweb-edu", shards=2, folder=tmp_path, pause=0.01)
    with pytest.raises(UserError, match="shard_00000.*404"):
        next(source.documents("train"))
