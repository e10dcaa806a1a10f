"""The universal checkpoint: a zarr v3 group with a manifest, which any layout writes and any layout reads."""
