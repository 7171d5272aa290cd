"""Triton reads TRITON_INTERPRET when a kernel is defined, so these tests run in a process of their own (`make test`)."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
