"""Passes: one file each, named by its verb. `registry` lists them, `manager` runs them."""
