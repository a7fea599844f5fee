"""Converters, one file per source framework or toolchain, reached by name from `edgekit.convert`.

Each edge is a function `(source, target)` that runs in a child process, imports its framework
inside, writes `target`, and raises an EdgeKitError where it must refuse.
"""
