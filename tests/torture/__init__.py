"""Bad inputs and kills by the thousand: ``make torture`` runs them, by seed.

``python -m tests.torture --help`` lists the parts. Each case follows from its number alone, so that a
case that failed can be repeated.
"""
