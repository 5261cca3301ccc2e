"""What makes good plans, at the scale of the toy world: `python -m benchmarks.quality.planner_study`.

Planners that were trained with masks of each task's own Beta distribution and with uniform ones, with and without the
language loss, plan held-out samples in many ways, and answer questions as they did before they learned to plan.
"""
