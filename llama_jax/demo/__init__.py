"""The demo's task: one sentence of a shop's mail in, one strict JSON record out."""
