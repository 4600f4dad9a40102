"""A server does not search for garbage in what it loaded, and still frees what its requests leave."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit
CODE = """
import gc, weakref
from qvl_runtime.server import launch
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.keys import Keys

class Node: pass

class Stop(Exception): pass

def make(load, config):
    model = load()
    raise Stop(model)

launch.Service = make
before = len(gc.get_objects())
try:
    launch.serve(lambda: [Node()], ServerConfig(), Keys(None), "127.0.0.1", 0)
except Stop as stop:
    model = stop.args[0]
assert gc.get_freeze_count() > before / 2, "what was loaded is still searched"
later = Node()
later.self = later
gone = weakref.ref(later)
del later
gc.collect()
assert gone() is None, "garbage that was made later stays"
print("fine", type(model[0]).__name__)
"""


def test_what_was_loaded_is_searched_no_more_and_later_garbage_is() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert found.stdout == "fine Node\n", found.stderr
