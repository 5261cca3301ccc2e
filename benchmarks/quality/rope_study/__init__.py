"""SA-3D RoPE against plain 3D RoPE and a learned segment embedding: `python -m benchmarks.quality.rope_study`.

Small renderers make clips of toy things that reference images show. The text names an image by its number alone, so
that the right thing comes out only if the model can tell its sources apart. Everything but the encoding is equal.
"""
