"""How good a planner's plans are, without a renderer: `python -m benchmarks.quality.plans`.

Plans of held-out samples of the toy world are compared with the true embeddings of their targets, and a probe that was
trained on true embeddings reads from them what they show. Questions are asked, too.
"""
