"""Products on a CPU that this package compiles itself, with the C compiler of the machine.

For CPUs with AVX-512: elsewhere, and where there is no compiler, torch's own products are taken. What is compiled is a
few short files of C, once for a machine, and kept in the user's cache.
"""
