"""Segment-aware 3D rotary position embedding (SA-3D RoPE)."""
