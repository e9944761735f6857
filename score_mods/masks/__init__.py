"""One file a mask; `score_mods.registry` gives them their names."""
