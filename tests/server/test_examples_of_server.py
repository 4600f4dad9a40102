"""The examples of docs/server.md run against the small checkpoint, and what deploy/ names exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvl_runtime import Engine
from qvl_runtime.cli.flags import flags_of
from qvl_runtime.cli.options import ReadingOptions
from qvl_runtime.cli.serve import ServeOptions
from qvl_runtime.server.keys import Keys
from tests.server.conftest import KEY, Live, keys_file, serving

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, DEPLOY = ROOT / "examples" / "server", ROOT / "deploy"
PACKAGES = Path(os.environ.get("QVL_NODE_MODULES", ROOT / "build" / "npm" / "node_modules"))


def run(live: Live, *command: str | Path) -> str:
    environment = os.environ | {"QVL_URL": f"{live.url}/v1", "QVL_KEY": KEY}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_python(live: Live) -> None:
    found = run(live, sys.executable, EXAMPLES / "client.py")
    assert re.match(r"cat at pixels \[\d+, \d+, \d+, \d+\], score 0\.\d\d\n2066\n", found)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(live: Live) -> None:
    whole, stream = run(live, "sh", EXAMPLES / "client.sh").split("\n", 1)
    assert json.loads(whole)["choices"][0]["message"]["qvl"]["boxes"][0]["label"] == "cat"
    assert stream.endswith("data: [DONE]\n\n")


@pytest.fixture
def node_folder(tmp_path: Path) -> Path:
    """A folder where node finds the client, the example and its image."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    if not (PACKAGES / "openai").is_dir():
        pytest.skip("needs npm's openai package: make npm-client, or set QVL_NODE_MODULES")
    (tmp_path / "node_modules").symlink_to(PACKAGES)
    shutil.copytree(EXAMPLES, tmp_path / "examples" / "server")
    (tmp_path / "qvl_runtime").symlink_to(ROOT / "qvl_runtime")
    return tmp_path


def test_javascript(live: Live, node_folder: Path) -> None:
    found = run(live, "node", node_folder / "examples" / "server" / "client.mjs")
    assert re.match(r"cat at pixels \d+,\d+,\d+,\d+, score 0\.\d\d\n2066\n", found)


def test_every_call_of_the_npm_client(nano: Engine, node_folder: Path, demo_url: str) -> None:
    """SERVING 1b, 1: npm's client, without retries: calls, streams, abort, error classes."""
    script = node_folder / "calls.mjs"
    shutil.copy(Path(__file__).parent / "calls.mjs", script)
    with serving(lambda: nano, Keys(keys_file(node_folder))) as keyed:
        command = ["node", str(script), f"{keyed.url}/v1", KEY, demo_url]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ran.stdout == "all passed\n", ran.stderr
        keyed.wait_free()


def test_the_dashboard_asks_for_metrics_that_exist(live: Live) -> None:
    live.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
    found = live.get("/metrics").body.decode()
    text = (DEPLOY / "grafana.json").read_text()
    names = set(re.findall(r"qvl_[a-z0-9_]+", text))
    assert len(names) > 15 and json.loads(text)["panels"]
    for name in names:
        assert re.search(rf"^{name}(\{{| )", found, re.MULTILINE), name


def test_options_in_deploy_exist() -> None:
    known = {*flags_of(ServeOptions).values(), *flags_of(ReadingOptions).values()}
    for name in ("qvl.service", "Dockerfile", "Dockerfile.cuda", "compose-single.yaml", "nginx-tls.conf"):
        text = (DEPLOY / name).read_text()
        commands = (
            [text]
            if name == "compose-single.yaml"
            else re.findall(r"qvl serve(?:[^\n]|\\\n)*|ENTRYPOINT.*|CMD \[.*", text)
        )
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(commands))) - {"--profile"}
        assert used <= known, used - known
        assert used
