"""Whether a server fits a TPU slice: every step of its engine, compiled by the real TPU compiler,
without a TPU.

Bytes are the compiler's own. Times are bounds: what the published peak rates of a chip allow for
the counted work, not what a chip will do.
"""
