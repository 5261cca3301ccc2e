"""What plans are worth to a renderer, at the scale of the toy world: `python -m benchmarks.quality.cotraining_study`.

Planners and renderers that were trained together, with and without a warm-up of the connector, on the paper's plans and
on others, render held-out samples without a plan, with the one that they predict and with the true one.
"""
