"""Triton kernels of `impl="triton"`, one stage a file. Importing this package needs no Triton; importing a stage does.

Order of a forward: chunk_state (fwd), state_scan, chunk_output. Of a backward: chunk_state (fwd) and state_scan again,
chunk_state (bwd), state_scan (reversed), chunk_dq, chunk_dkv. `docs/kernels.md` explains the structure.
"""
