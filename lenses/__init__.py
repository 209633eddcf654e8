"""The three lenses of eval.py: the questions, the rules, the judge, and how their figures are told."""
