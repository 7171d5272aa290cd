"""Triton reads TRITON_INTERPRET when a kernel is defined: `make test` runs this folder in a process of its own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
