"""Baselines that a criterion has to beat: chance, the size of filters, and their effect on the loss to first order.

They only decide which channels go. Nothing is restored unless that is asked for, as in the papers.
"""
