"""Functions that torch.compile leaves as they are."""

from torch._compile import _disable_dynamo

run_eagerly = _disable_dynamo
"""Decorator: under torch.compile a function runs uncompiled (``torch.compiler.disable``, without importing dynamo)."""
