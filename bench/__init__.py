"""The benchmark house: rivals, inputs, timing, and the main job that `python -m fastmem bench` runs."""
