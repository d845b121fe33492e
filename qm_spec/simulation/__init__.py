"""A roofline model of speculative decoding, for machines, lengths and traffic that nobody has measured here.

Everything in this package is a prediction. How far it is off where it could be checked stands in
`docs/results/simulation.md`.
"""
