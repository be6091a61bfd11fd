"""Kernels of the op ``cef::attention``; reached through :mod:`cef_compile.ops` only."""
