"""From JSON lines to batches: sources, rendering, packing, and the order in which rows come.

Three words: a *row* is what a file holds; a *sample* is its token ids and which of them are
trained; a *batch* is what a step eats. Samples are made once, at the start, so that what will be
trained is counted before the first step; batches are arranged from them on the way.
"""
