"""What a user may pass as an image, and what is said of the files that are none."""

from __future__ import annotations

import base64
import io
import os
import random
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qvl_runtime.errors import DownloadError, ImageError
from qvl_runtime.prompt import fetch
from qvl_runtime.prompt.images import describe, load_image
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.sources import read_bytes
from tests.faults.image_files import DIGEST, NO_FILES, PIXELS, PNG
from tests.faults.image_files import saved_pixels as saved


class TestAddresses:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("a.png", "图 1#.png", "50%.png", " a.png ", "tail.png"):
            (tmp_path / name).write_bytes(PNG)
        return tmp_path

    def test_file_urls(self, folder: Path) -> None:
        sources = [path.as_uri() for path in folder.iterdir()]
        assert any("%E5%9B%BE%201%23" in url for url in sources) and any("50%25" in url for url in sources)
        sources += [f"file://localhost{folder}/a.png", f"file:{folder}/a.png", f"FILE://{folder}/a.png"]
        sources += [f"file://{folder}/图 1#.png", f"  file://{folder}/a.png\n"]
        for source in sources:
            assert load_image(source, 28).digest == DIGEST, source

    @pytest.mark.skipif(os.fsencode("\udcff") != b"\xff", reason="file names are Unicode here")
    def test_a_name_that_is_not_utf_8(self, folder: Path) -> None:
        path = folder / os.fsdecode(b"\xff\xe9.png")
        path.write_bytes(PNG)
        for source in (path, str(path), path.as_uri()):
            assert load_image(source, 28).digest == DIGEST

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("file://server/share/a.png", "is on the host 'server', and only local files are read"),
            ("file://127.0.0.1/a.png", "is on the host '127.0.0.1'"),
            ("file:a.png", "is not a file URL; expected file:///folder/image.png"),
            ("file://", "is not a file URL"),
            ("file:///no/such.png", "does not exist"),
            ("file:///tmp", "not a regular file"),
            ("file:///a%00.png", "cannot be read"),
            ("s3://bucket/a.png", "has the scheme 's3'; supported are http, https, file and data"),
        ],
    )
    def test_other_addresses(self, url: str, message: str) -> None:
        with pytest.raises(ImageError, match=message):
            load_image(url, 28)

    @pytest.mark.parametrize("form", ["{}", "file://{}", "FILE:{}", " file://localhost{} ", "  {} "])
    def test_files_may_be_forbidden_in_every_form(self, folder: Path, form: str) -> None:
        for name in ("a.png", "missing.png"):  # in the same words: nothing tells whether a file exists
            with pytest.raises(ImageError, match="is a file path, which is not allowed here"):
                load_image(form.format(folder / name), 28, NO_FILES)
        with pytest.raises(ImageError, match="not allowed here"):
            load_image("~/a.png", 28, NO_FILES)

    def test_the_home_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder))
        assert load_image("~/a.png", 28).digest == DIGEST
        monkeypatch.chdir(folder)
        with pytest.raises(ImageError, match=r"~/missing\.png\) does not exist"):
            load_image("~/missing.png", 28, name="image 1")
        with pytest.raises(ImageError, match="does not exist"):
            load_image("~root/a.png", 28)
        (folder / "~").mkdir()
        (folder / "~" / "missing.png").write_bytes(PNG)  # a folder of that name comes first
        assert load_image("~/missing.png", 28).digest == DIGEST

    def test_white_space_around(self, folder: Path) -> None:
        data_url = "data:image/png;base64," + base64.b64encode(PNG).decode()
        for source in (f"{folder}/a.png", f"{folder}/tail.png", data_url, f"file://{folder}/a.png"):
            for around in (f"{source} \n", f"\t{source}", f" {source}\r\n"):
                assert load_image(around, 28).digest == DIGEST, around[:90]
        assert load_image(f"{folder}/ a.png ", 28).digest == DIGEST, "a file's own name comes first"

    def test_white_space_is_not_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[str] = []

        def download(url: str, *_: object) -> bytes:
            sent.append(url)
            return PNG

        monkeypatch.setattr(fetch, "_follow", download)
        assert load_image(" http://example.com/a.png \n", 28).source == "http://example.com/a.png"
        assert sent == ["http://example.com/a.png"]

    @pytest.mark.parametrize(
        "url", ["http://user:pass@example.com/a.png", "https://token@example.com", "http://a:b@c:80/x?y=z@w"]
    )
    def test_credentials(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch, "_follow", lambda *_: pytest.fail("nothing is asked of the host"))
        with pytest.raises(DownloadError, match="credentials in the address are not used") as caught:
            load_image(url, 28)
        assert not re.search(":pass|token|a:b", str(caught.value))

    @pytest.mark.parametrize(
        "url", ["http://example.com/a@2x.png", "http://example.com?mail=a@b", "https://h/@u/i.png"]
    )
    def test_no_credentials(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch, "_follow", lambda *_: PNG)
        assert load_image(url, 28).digest == DIGEST


class TestBytesInMemory:
    @pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG"])
    def test_base64_in_every_form(self, kind: str) -> None:
        data = saved(kind)
        plain, url_safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
        assert plain != url_safe or kind in ("BMP",)
        head = "data:image/x;base64,"
        lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
        sources = [plain, url_safe, url_safe.rstrip("="), lines, f" {plain}\n"]
        sources += [head + plain, head + url_safe.rstrip("="), head + " " + lines, head + plain.replace("+", "%2B")]
        sources += ["DATA:image/x;charset=utf-8;Base64," + plain]
        expected = load_image(data, 28).digest
        for source in sources:
            assert load_image(source, 28, NO_FILES).digest == expected, source[:60]

    def test_it_is_not_repeated(self) -> None:
        text = base64.b64encode(PNG).decode()
        assert describe(text) == f"base64 of {len(text):,} characters"
        with pytest.raises(ImageError, match="starts like PNG, but its header is damaged") as caught:
            load_image(text[:16] + "A" * 200, 28)
        assert text[:20] not in str(caught.value)

    @pytest.mark.parametrize("text", ["aGVsbG8gd29ybGQ" * 40, "A" * 5000, "x/" * 3000])
    def test_a_string_too_long_for_a_path(self, text: str) -> None:
        with pytest.raises(
            ImageError, match="expected a path, an address, or a data URL for an image in base64"
        ) as caught:
            load_image(text, 28)
        assert len(str(caught.value)) < 300

    def test_base64_longer_than_a_piece(self) -> None:
        """It is decoded by pieces of 2^18 characters, wherever its lines end; padding within it is no end."""
        data = random.Random(0).randbytes(600_001)
        plain, limits = base64.b64encode(data).decode(), ImageLimits()
        for text in (plain, plain.rstrip("="), base64.encodebytes(data).decode(), plain.replace("+", "-") + " =\n"):
            assert read_bytes(f"data:image/png;base64,{text}", limits, "it") == data
        for broken in (plain[: 2**18] + "==" + plain, plain[: 2**18 - 2] + "==" + plain, plain + "!", plain + "A"):
            with pytest.raises(ImageError, match="is not base64"):
                read_bytes(f"data:image/png;base64,{broken}", limits, "it")
        with pytest.raises(ImageError, match="over the limit"):
            read_bytes(f"data:image/png;base64,{plain}", ImageLimits(max_image_bytes=600_000), "it")

    @pytest.mark.parametrize(
        "payload", ["@@@@", "iVBOR*", "iVBORw0KGgo=AAAA", "A", "é" * 8, "\ud800" * 4], ids=lambda text: ascii(text)
    )
    def test_broken_base64(self, payload: str) -> None:
        with pytest.raises(ImageError, match="is not base64") as caught:
            load_image(f"data:image/png;base64,{payload}", 28)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("url", ["data:image/png,raw", "data:image/png;base64", "data:", "data:;utf8,%3Csvg"])
    def test_other_data_urls(self, url: str) -> None:
        with pytest.raises(ImageError, match=r"expected data:image/\.\.\.;base64"):
            load_image(url, 28)

    def test_bytes_like(self) -> None:
        shaped = memoryview(PNG + bytes(-len(PNG) % 4)).cast("I")
        for source in (PNG, bytearray(PNG), memoryview(PNG), shaped, memoryview(PNG + PNG)[: len(PNG)]):
            assert load_image(source, 28).digest == DIGEST
        assert describe(shaped) == f"{shaped.nbytes:,} bytes"
        with pytest.raises(ImageError, match="over the limit of"):
            load_image(shaped, 28, ImageLimits(max_image_bytes=shaped.nbytes - 1))


class Endless(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return len(buffer)


class Upload:
    """As web frameworks have it: to be awaited."""

    async def read(self, size: int = -1) -> bytes:
        return PNG


class TestOpenFiles:
    def test_from_the_start_and_again(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(PNG)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.png", PNG)
        memory, spooled = io.BytesIO(), tempfile.SpooledTemporaryFile()  # noqa: SIM115 - closed below
        for file in (memory, spooled):
            Image.fromarray(PIXELS).save(file, "PNG")  # leaves the position at the end
        with (
            (tmp_path / "a.png").open("rb") as buffered,
            (tmp_path / "a.png").open("rb", buffering=0) as raw,
            zipfile.ZipFile(tmp_path / "a.zip") as archive,
            archive.open("a.png") as member,
            spooled,
        ):
            for opened in (memory, spooled, buffered, raw, member):
                for _ in range(2):  # a chat sends its history again
                    assert load_image(opened, 28, NO_FILES).digest == DIGEST
            assert describe(buffered) == f"open file {tmp_path}/a.png"
        assert describe(memory) == "open BytesIO"

    def test_a_stream_is_read_once(self) -> None:
        read_end, write_end = os.pipe()
        with os.fdopen(read_end, "rb") as stream:
            os.write(write_end, PNG)
            os.close(write_end)
            assert load_image(stream, 28).digest == DIGEST
            with pytest.raises(ImageError, match=r"is empty \(0 bytes\)"):
                load_image(stream, 28)

    def test_limits_hold(self) -> None:
        limits = ImageLimits(max_image_bytes=len(PNG) - 1)
        for file in (io.BytesIO(PNG), io.BufferedReader(io.BytesIO(PNG)), Endless()):
            with pytest.raises(ImageError, match="over the limit of"):
                load_image(file, 28, limits)

    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(PNG)
        with (tmp_path / "a.png").open("rb") as closed:
            pass
        with (
            (tmp_path / "a.png").open(encoding="latin-1") as text,
            pytest.raises(ImageError, match="is opened as text; expected a file opened with mode 'rb'"),
        ):
            load_image(text, 28)
        memory = io.BytesIO(PNG)
        memory.close()
        for file in (closed, memory):
            with pytest.raises(ImageError, match="is a closed file"):
                load_image(file, 28)
        with (tmp_path / "b.png").open("wb") as for_writing, pytest.raises(ImageError, match="cannot be read"):
            load_image(for_writing, 28)
        with pytest.raises(ImageError, match="gives coroutine when it is read; expected bytes"):
            load_image(Upload(), 28)
        with pytest.raises(ImageError, match="opened as text"):
            load_image(io.StringIO("x"), 28)


class TestTensors:
    def test_the_layout_of_an_image(self) -> None:
        tensor = torch.from_numpy(PIXELS)
        for source in (tensor, tensor.clone().transpose(0, 1).transpose(0, 1), tensor / 255, (tensor / 255).double()):
            assert load_image(source, 28).digest == DIGEST
        assert load_image(tensor[:, :, 0], 28).digest == load_image(PIXELS[:, :, 0], 28).digest

    def test_channels_first_is_refused_with_the_way_out(self) -> None:
        tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
        with pytest.raises(ImageError, match=r"^Tensor 3 x 20 x 30 has the wrong shape;.*array\.transpose\(1, 2, 0\)"):
            load_image(tensor, 28)
        with pytest.raises(ImageError, match="wrong shape"):
            load_image(tensor[None], 28)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.zeros(4, 4, 3, requires_grad=True),
            torch.zeros(4, 4, device="meta"),
            torch.zeros(4, 4, dtype=torch.bfloat16),
        ],
    )
    def test_what_numpy_cannot_read(self, tensor: torch.Tensor) -> None:
        with pytest.raises(ImageError, match="cannot be read as a numpy array"):
            load_image(tensor, 28)

    def test_any_array_library(self) -> None:
        class Array:
            def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
                return PIXELS

        assert load_image(Array(), 28).digest == DIGEST
