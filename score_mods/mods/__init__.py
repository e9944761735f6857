"""One file a score mod; `score_mods.registry` gives them their names."""
