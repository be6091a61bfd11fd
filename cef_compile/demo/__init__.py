"""The main job: denoise a real clip with the embedded tiny Wan, dense and filtered, and compare.

``cef-compile demo`` is its command line; :func:`cef_compile.demo.run.run_demo` is the same thing
from Python. It needs the optional dependencies of ``cef-compile[demo]``.
"""
