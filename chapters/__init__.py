"""Kernel by Kernel: the chapters. Importing any of them picks the backend first (see ``common``)."""

import common as _common

BACKEND = _common.BACKEND
