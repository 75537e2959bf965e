"""One file per method: validation, sites, the equation in plain torch, lowering to primitives."""
